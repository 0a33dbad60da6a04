"""Tokens per second of answers to one caller and to eight, against `generate()` and `generate_batch()` of transformers.

    python benchmarks/bench_generate.py [--model PATH] [--callers 8] [--prompt 64] [--answer 64] [--rounds 3]

Greedy, float32, on the CPU. Also: how long a newcomer waits for its first token while the others are answered.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig

from luthier.core.log import silence_libraries
from luthier.infer.engines.huggingface import HuggingFaceModel
from luthier.infer.types import Settings
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, vocab_size, (count, length), generator=generator).tolist()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def loop(model: Any, asked: list[list[int]], config: GenerationConfig) -> None:
    for ids in asked:
        given = torch.tensor([ids])
        model.generate(given, attention_mask=torch.ones_like(given), generation_config=config)


def together(engine: HuggingFaceModel, asked: list[list[int]], settings: Settings) -> None:
    for ticket in [engine.submit(ids, settings) for ids in asked]:
        for _ in ticket.pieces():
            pass


def first_token(engine: HuggingFaceModel, asked: list[list[int]], settings: Settings) -> tuple[float, float]:
    """Seconds to the first token of a newcomer: alone, and while the others are answered."""

    def wait(ids: list[int]) -> float:
        start = time.perf_counter()
        ticket = engine.submit(ids, settings)
        next(ticket.pieces())
        passed = time.perf_counter() - start
        ticket.cancel()
        return passed

    alone = statistics.median(wait(asked[-1]) for _ in range(3))
    others = Thread(target=together, args=(engine, asked[:-1], settings))
    others.start()
    while engine.num_running < len(asked) - 1:
        time.sleep(0.01)
    beside = statistics.median(wait(asked[-1]) for _ in range(3))
    others.join()
    return alone, beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    silence_libraries()
    source = ModelSource(options.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32).eval()
    asked = prompts(options.callers, options.prompt, model.config.vocab_size)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=options.answer, min_new_tokens=options.answer, pad_token_id=0
    )
    settings = Settings(do_sample=False, max_new_tokens=options.answer, ignore_eos=True)
    engine = HuggingFaceModel(model, tokenizer, [], max_rows=options.callers)
    tokens = options.answer * options.callers
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "generate(), one prompt": (lambda: loop(model, asked[:1], config), options.answer),
        "luthier, one caller": (lambda: together(engine, asked[:1], settings), options.answer),
        "generate(), in a loop": (lambda: loop(model, asked, config), tokens),
        "generate_batch(), together": (
            lambda: model.generate_batch(asked, generation_config=config, progress_bar=False),
            tokens,
        ),
        f"luthier, {options.callers} callers": (lambda: together(engine, asked, settings), tokens),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, (work, num_tokens) in [*ways.items()] * (options.rounds + 1):  # in turn: a machine's speed changes
        found[name].append(num_tokens / seconds(work))
    print(f"{options.model}: {options.callers} prompts of {options.prompt} tokens, answers of {options.answer}")
    rates = {name: statistics.median(some[1:]) for name, some in found.items()}
    generate, one, _, _, many = rates.values()
    for name, rate in rates.items():
        spread = f"{min(found[name][1:]):.1f} to {max(found[name][1:]):.1f}"
        print(f"{name:<28} {rate:7.1f} tokens/s ({spread})")
    print(f"one caller: {one / generate:.2f} x generate(); {options.callers} callers: {many / one:.2f} x one")
    alone, beside = first_token(engine, asked, settings)
    step = options.callers / many
    print(
        f"first token of a newcomer: {1000 * alone:.0f} ms alone, {1000 * beside:.0f} ms beside the others;"
        f" a step of them takes about {1000 * step:.0f} ms"
    )


if __name__ == "__main__":
    main()
