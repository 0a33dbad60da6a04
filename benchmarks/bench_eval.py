"""Seconds for multiple-choice questions against lm-evaluation-harness with its own model of transformers (`HFLM`).

    python -m benchmarks.bench_eval [--model PATH] [--questions 1000] [--batch-size 4] [--rounds 1]

Four choices of several words each, scored as texts after the question; and the letters of the choices after five
solved examples. In float32 on the CPU. Both sides get the same requests and the same batch size, and their
log-probabilities are compared. The ratio is that of CPU seconds.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from luthier.core.log import silence_libraries
from luthier.evals.scorer import Scorer, encode_pair
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"
THINGS = ("river", "engine", "violin", "glacier", "harbour", "lantern", "orchard", "telescope", "bridge", "kettle")
PLACES = ("mountains", "old town", "northern islands", "desert", "valley", "capital", "marshes", "coast")
VERBS = ("carries", "hides", "measures", "cools", "protects", "collects", "reflects", "feeds")


def question(draw: random.Random) -> tuple[str, list[str]]:
    """About 60 tokens of text, and four answers of about ten tokens."""
    thing, place = draw.choice(THINGS), draw.choice(PLACES)
    text = (
        f"A traveller in the {place} writes about a {thing} that people there have known for {draw.randrange(20, 900)}"
        f" years. She asks the {draw.choice(('miller', 'teacher', 'captain', 'doctor'))} what it is good for, and why"
        f" nobody has replaced it in all this time. Which answer does she most likely get from people who use it daily?"
    )
    answers = [
        f"It {draw.choice(VERBS)} the {draw.choice(THINGS)} near the {draw.choice(PLACES)} when it is needed"
        for _ in range(4)
    ]
    return text, answers


def as_texts(count: int) -> list[tuple[str, str]]:
    """Each choice is a continuation of its question."""
    draw = random.Random(0)
    questions = [question(draw) for _ in range(count)]
    return [(f"Question: {text}\nAnswer:", f" {answer}") for text, answers in questions for answer in answers]


def as_letters(count: int) -> list[tuple[str, str]]:
    """The letter of each choice after five solved examples, which all questions share."""
    draw = random.Random(1)

    def shown() -> str:
        text, answers = question(draw)
        return (
            text
            + "".join(f"\n{letter}. {answer}" for letter, answer in zip("ABCD", answers, strict=True))
            + "\nAnswer:"
        )

    examples = "".join(f"{shown()} {draw.choice('ABCD')}\n\n" for _ in range(5))
    return [(examples + asked, f" {letter}") for asked in (shown() for _ in range(count)) for letter in "ABCD"]


def timed(work: Callable[[], list[float]]) -> tuple[float, float, list[float]]:
    """(seconds, CPU seconds, log-probabilities)"""
    wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    found = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter() - wall, after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime, found


def main() -> None:
    from lm_eval.models.huggingface import HFLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    silence_libraries()
    import torch

    source = ModelSource(options.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32).eval()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    for name, make in (("answers as texts", as_texts), ("letters, 5 examples", as_letters)):
        texts = make(options.questions)
        requests = [SimpleNamespace(args=pair) for pair in texts]

        def harness(requests: list[SimpleNamespace] = requests) -> list[float]:
            return [logprob for logprob, _ in theirs.loglikelihood(requests, disable_tqdm=True)]

        def luthier(texts: list[tuple[str, str]] = texts) -> list[float]:
            scorer = Scorer(model, options.batch_size)
            return [score.logprob for score in scorer.scores([encode_pair(tokenizer, *pair) for pair in texts])]

        for _ in range(options.rounds):
            own, other = timed(luthier), timed(harness)
            apart = max(abs(a - b) for a, b in zip(own[2], other[2], strict=True))
            print(
                f"{name:<20} {options.questions} questions, batch size {options.batch_size}:"
                f" luthier {own[0]:.1f} s ({own[1]:.1f} CPU s), HFLM {other[0]:.1f} s ({other[1]:.1f} CPU s),"
                f" {other[1] / own[1]:.2f} times as fast; log-probabilities differ by up to {apart:.1e}"
            )


if __name__ == "__main__":
    main()
