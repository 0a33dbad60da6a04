"""Tokens per second of answers: greedy, one at a time, against `generate()`; and rollouts of eight against one.

`python -m benchmarks.goals.answers MODEL ROUNDS` measures rollouts in its own process and prints a JSON object.
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
from benchmarks.goals.training import command, memory_cell, work_file
from benchmarks.goals.turns import ROOT, ProgramFailed, Ratio, take_turns

if TYPE_CHECKING:
    from benchmarks.goals.training import Setting

PROMPT, ANSWER = 64, 64
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


def measured_rollouts(setting: "Setting") -> dict[str, list[float]]:
    words = [sys.executable, "-m", "benchmarks.goals.answers", str(setting.model), str(setting.num_steps)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ProgramFailed(f"rollouts ended with status {done.returncode}:\n{done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_decode(dtype: str, setting: "Setting") -> list[Row]:
    keys = {"model_name_or_path": str(setting.model)}
    settings = {"dtype": dtype, "prompt": PROMPT, "answer": ANSWER, "turns": setting.num_steps + 1}
    file = work_file(setting.folder, f"decode-{dtype}", keys, None, **settings)
    found = take_turns({name: command(f"{name}-answers", file) for name in ("reference", "luthier")})
    reference, ours = found["reference"], found["luthier"]
    speeds = [ANSWER / one.median for one in (reference, ours)]
    remark = f"{speeds[0]:.1f} -> {speeds[1]:.1f} tokens/s against generate()"
    ratio = Ratio.of(reference.seconds, ours.seconds)
    cell = memory_cell(reference, ours)
    return [Row(f"greedy decoding, batch 1, {dtype}", "2x", str(ratio), memory=cell, note=remark)]


def measure_rollouts(setting: "Setting") -> list[Row]:
    found = measured_rollouts(setting)
    ratio = Ratio.of([NUM_ANSWERS * one for one in found["one"]], found["many"])
    one, many = (n * ANSWER / statistics.median(found[name]) for name, n in (("one", 1), ("many", NUM_ANSWERS)))
    remark = f"{one:.1f} -> {many:.1f} tokens/s, sampled from the same prompt"
    return [Row(f"grpo rollout, tokens/s at {NUM_ANSWERS} answers against one", "6x", str(ratio), note=remark)]


MEASURES: dict[str, Callable[["Setting"], list[Row]]] = {
    "decode-float32": partial(measure_decode, "float32"),
    "decode-bf16": partial(measure_decode, "bfloat16"),
    "rollout": measure_rollouts,
}


def main(model_folder: str, rounds: str) -> None:
    from luthier.core.log import silence_libraries

    silence_libraries()
    print(json.dumps(rollouts(model_folder, int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
