"""What a reward is: it takes the answers of one rollout (of one process) and gives one finite number for each.

Each other file here is one kind: Python functions of the user, a reward model, a server.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from luthier.core.errors import RunFailed


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of the policy."""

    prompt_ids: list[int]
    answer_ids: list[int]
    """The token that ended it included."""
    prompt: str
    """Without special tokens, as the answer is."""
    answer: str
    given: str
    """The answer that the data give, or empty."""
    text: str
    """Prompt and answer with their special tokens."""
    stopped: bool
    """Whether it came to its end, and was not cut off at `max_new_tokens`."""


class Reward(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, answers: Sequence[Answered]) -> list[float]: ...


def checked(who: str, scores: Any, answers: Sequence[Answered]) -> list[float]:
    """One finite number for each answer. Raises `RunFailed` that names `who` and the row."""
    if isinstance(scores, torch.Tensor):
        scores = scores.tolist()
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RunFailed(f"{who}: it gave a {type(scores).__name__} -> return a list with one number for each answer")
    if len(scores) != len(answers):
        raise RunFailed(f"{who}: it gave {len(scores)} scores for {len(answers)} answers -> return one for each")
    for number, (score, answered) in enumerate(zip(scores, answers, strict=True)):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise RunFailed(
                f"{who}: its score of answer {number} is {score!r}, not a finite number; prompt"
                f" {answered.prompt[-80:]!r}, answer {answered.answer[:80]!r}"
            )
    return [float(score) for score in scores]


@dataclass(frozen=True, slots=True)
class WeightedRewards:
    """sum_i w_i s_i."""

    rewards: Sequence[Reward]
    weights: Sequence[float]

    def __call__(self, answers: Sequence[Answered]) -> tuple[list[float], dict[str, list[float]]]:
        """The sum for each answer, and the scores of each reward if there are several."""
        each = {reward.name: reward(answers) for reward in self.rewards}
        columns = zip(*each.values(), strict=True)
        sums = [sum(w * s for w, s in zip(self.weights, scores, strict=True)) for scores in columns]
        return sums, each if len(each) > 1 else {}
