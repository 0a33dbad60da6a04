"""Tokens per second of answers: greedy, one at a time, against `generate()`; and rollouts of eight against one.

`python -m benchmarks.goals.answers KIND MODEL ROUNDS` measures one kind in its own process and prints a JSON object.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.goals.rows import Row
from benchmarks.goals.turns import ROOT, ProgramFailed, Ratio

if TYPE_CHECKING:
    from benchmarks.goals.training import Setting

PROMPT, ANSWER = 64, 24
"""Tokens of each."""
NUM_ANSWERS = 8


def alternately(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each round after the first, which warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def decode(model_folder: str, dtype: str, rounds: int) -> dict[str, list[float]]:
    import torch
    from transformers import GenerationConfig

    from benchmarks.bench_generate import loop, prompts, together
    from luthier.infer.engines.huggingface import HuggingFaceModel
    from luthier.infer.types import Settings
    from luthier.model.files.sources import ModelSource
    from luthier.model.loading.load import load_model
    from luthier.model.tokenizer import load_tokenizer

    source = ModelSource(model_folder)
    # Each has its own copy, since the engine changes how layers compute while it answers.
    model, own = (load_model(source, dtype=getattr(torch, dtype)).eval() for _ in range(2))
    asked = prompts(1, PROMPT, model.config.vocab_size)
    config = GenerationConfig(do_sample=False, max_new_tokens=ANSWER, min_new_tokens=ANSWER, pad_token_id=0)
    engine = HuggingFaceModel(own, load_tokenizer(source), [], max_rows=1)
    settings = Settings(do_sample=False, max_new_tokens=ANSWER, ignore_eos=True)
    return alternately(
        {
            "reference": lambda: loop(model, asked, config),
            "luthier": lambda: together(engine, asked, settings),
        },
        rounds,
    )


def rollouts(model_folder: str, rounds: int) -> dict[str, list[float]]:
    """As grpo samples its answers: one to a prompt, and eight to the same prompt."""
    import torch

    from benchmarks.bench_generate import prompts
    from luthier.infer.batch import generate_answers
    from luthier.infer.types import Settings
    from luthier.model.files.sources import ModelSource
    from luthier.model.loading.load import load_model
    from luthier.model.tokenizer import load_tokenizer

    source = ModelSource(model_folder)
    model, tokenizer = load_model(source, dtype=torch.float32).eval(), load_tokenizer(source)
    (prompt,) = prompts(1, PROMPT, model.config.vocab_size)
    settings = Settings(do_sample=True, max_new_tokens=ANSWER, ignore_eos=True)

    def sample(count: int) -> None:
        answers = list(
            generate_answers(model, tokenizer, [prompt] * count, settings, (), count, seeds=list(range(count)))
        )
        assert all(len(answer) == ANSWER for answer in answers), "no answer ends early"

    return alternately({"one": partial(sample, 1), "many": partial(sample, NUM_ANSWERS)}, rounds)


def measured(kind: str, setting: "Setting") -> dict[str, list[float]]:
    words = [sys.executable, "-m", "benchmarks.goals.answers", kind, str(setting.model), str(setting.num_steps)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ProgramFailed(f"answers {kind} ended with status {done.returncode}:\n{done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_decode(dtype: str, setting: "Setting") -> list[Row]:
    found = measured(dtype, setting)
    speeds = {name: ANSWER / statistics.median(seconds) for name, seconds in found.items()}
    ratio = Ratio.of(found["reference"], found["luthier"])
    remark = f"{speeds['reference']:.1f} -> {speeds['luthier']:.1f} tokens/s against generate()"
    return [Row(f"greedy decoding, batch 1, {dtype}", "2x", str(ratio), note=remark)]


def measure_rollouts(setting: "Setting") -> list[Row]:
    found = measured("rollouts", setting)
    ratio = Ratio.of([NUM_ANSWERS * one for one in found["one"]], found["many"])
    one, many = (n * ANSWER / statistics.median(found[name]) for name, n in (("one", 1), ("many", NUM_ANSWERS)))
    remark = f"{one:.1f} -> {many:.1f} tokens/s, sampled from the same prompt"
    return [Row(f"grpo rollout, tokens/s at {NUM_ANSWERS} answers against one", "6x", str(ratio), note=remark)]


MEASURES: dict[str, Callable[["Setting"], list[Row]]] = {
    "decode-float32": partial(measure_decode, "float32"),
    "decode-bf16": partial(measure_decode, "bfloat16"),
    "rollout": measure_rollouts,
}


def main(kind: str, model_folder: str, rounds: str) -> None:
    from luthier.core.log import silence_libraries

    silence_libraries()
    is_rollout = kind == "rollouts"
    found = rollouts(model_folder, int(rounds)) if is_rollout else decode(model_folder, kind, int(rounds))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
