"""Rewards: each takes this process's answers of a rollout and returns one finite number per answer.

Each file in this folder is one kind: the user's Python functions, a reward model, a server.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from luthier.core.errors import RunFailed


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of the policy."""

    prompt_ids: list[int]
    answer_ids: list[int]
    """Stop token included."""
    prompt: str
    """Without special tokens, like `answer`."""
    answer: str
    given: str
    """The answer of the dataset, or empty."""
    text: str
    """Prompt and answer with their special tokens."""
    stopped: bool
    """Whether it ended with a stop token rather than at `max_new_tokens`."""
    media: tuple[str, ...] = ()
    """The items in the prompt (`luthier.data.media.kinds`)."""
    blocks: tuple[int, ...] = ()
    """Where their tokens begin and end in `prompt_ids`: start, stop, start, stop, ..."""


class Reward(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, answers: Sequence[Answered]) -> list[float]: ...


def checked(who: str, scores: Any, answers: Sequence[Answered]) -> list[float]:
    """One finite number per answer. Raises `RunFailed` that names `who` and the answer."""
    if isinstance(scores, torch.Tensor | np.ndarray):
        scores = scores.tolist()
    elif isinstance(scores, list | tuple):
        scores = [_plain(score) for score in scores]
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RunFailed(f"{who}: it returned a {type(scores).__name__} -> return a list with one number per answer")
    if len(scores) != len(answers):
        raise RunFailed(f"{who}: it returned {len(scores)} scores for {len(answers)} answers -> return one per answer")
    for number, (score, answered) in enumerate(zip(scores, answers, strict=True)):
        # Not `math.isfinite`: it fails on whole numbers that no float holds, which JSON may have.
        if not isinstance(score, int | float) or not -sys.float_info.max <= score <= sys.float_info.max:
            raise RunFailed(
                f"{who}: the score of answer {number} is {score!r}, not a finite number; prompt"
                f" {answered.prompt[-80:]!r}, answer {answered.answer[:80]!r}"
            )
    return [float(score) for score in scores]


def _plain(score: Any) -> Any:
    """A number of numpy, or a tensor with one number, as one of Python."""
    is_one = isinstance(score, np.generic) or (isinstance(score, torch.Tensor) and score.numel() == 1)
    return score.item() if is_one else score


def titles(names: Iterable[str]) -> dict[str, str]:
    """Name of a reward -> what the log calls it: a file without its folder, unless two would be called the same."""
    short = {name: name.rpartition("/")[2] for name in names}
    counts = Counter(short.values())
    return {name: title if counts[title] == 1 else name for name, title in short.items()}


@dataclass(frozen=True, slots=True)
class WeightedRewards:
    """sum_i w_i s_i."""

    rewards: Sequence[Reward]
    weights: Sequence[float]

    def __call__(self, answers: Sequence[Answered]) -> tuple[list[float], dict[str, list[float]]]:
        """The weighted sum per answer, and the scores of each reward if there are several."""
        each = {reward.name: reward(answers) for reward in self.rewards}
        columns = zip(*each.values(), strict=True)
        sums = [sum(w * s for w, s in zip(self.weights, scores, strict=True)) for scores in columns]
        return sums, each if len(each) > 1 else {}
