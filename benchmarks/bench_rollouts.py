"""Tokens per CPU second of answers sampled in training, one and eight to a prompt, and of `generate()` of transformers.

    python -m benchmarks.bench_rollouts [--model PATH] [--answers 8] [--prompt 64] [--answer 48] [--rounds 3]

LoRA of rank 8 on all linear layers, in train mode, float32, sampled at temperature 1, one thread. In the last two ways
every twelfth id of the vocabulary ends an answer.
"""

import argparse
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from luthier.core.log import silence_libraries
from luthier.infer.batch import generate_answers
from luthier.infer.types import Settings
from luthier.model.files.sources import ModelSource
from luthier.model.kernels.lora_layers import fuse_lora
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rate(work: Callable[[], int]) -> float:
    """Tokens per CPU second of `work`, which returns the number of its tokens."""
    start = cpu_seconds()
    num_tokens = work()
    return num_tokens / (cpu_seconds() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    source = ModelSource(options.model)
    tokenizer = load_tokenizer(source)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_model(source, dtype=torch.float32), lora)
    fuse_lora(model)
    model.train()
    prompt = torch.randint(100, 40_000, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    free: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    settings = Settings(**free, max_new_tokens=options.answer)

    def rollout(num_answers: int, stops: set[int]) -> int:
        given: dict[str, Any] = {"keeps_stop": True, "seeds": range(num_answers)}
        found = generate_answers(model, tokenizer, [prompt] * num_answers, settings, stops, num_answers, **given)
        return sum(len(answer) for answer in found)

    def generate(num_answers: int, stops: set[int]) -> int:
        model.eval()
        ids = torch.tensor([prompt] * num_answers)
        limits: dict[str, Any] = {"max_new_tokens": options.answer, "eos_token_id": sorted(stops) or None}
        torch.manual_seed(0)
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **free, **limits, pad_token_id=0)
        model.train()
        return int((found[:, options.prompt :] != 0).sum())

    stops = set(range(1000, model.config.vocab_size, 12))
    count = options.answers
    ways: dict[str, Callable[[], int]] = {
        "generate(), one answer": lambda: generate(1, set()),
        "luthier, one answer": lambda: rollout(1, set()),
        f"generate(), {count} answers": lambda: generate(count, set()),
        f"luthier, {count} answers": lambda: rollout(count, set()),
        f"generate(), {count} that end": lambda: generate(count, stops),
        f"luthier, {count} that end": lambda: rollout(count, stops),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, work in [*ways.items()] * options.rounds:  # in turn: a machine's speed changes
        found[name].append(rate(work))
    print(f"{options.model}: a prompt of {options.prompt} tokens, answers of up to {options.answer}")
    for name, rates in found.items():
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(f"{name:<24} {statistics.median(rates):7.1f} tokens per CPU second ({spread})")
    _, one, theirs, ours, *_ = (statistics.median(rates) for rates in found.values())
    print(f"{count} answers: {ours / one:.2f} x one, {ours / theirs:.2f} x generate()")


if __name__ == "__main__":
    main()
