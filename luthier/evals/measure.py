"""A metric of a set of questions, in a form from which its standard error and its intervals follow.

Every metric here is a function of sums over the questions:

    mean score             sum(score) / N
    perplexity             exp(sum(loss) / sum(tokens))
    macro F1 of classes    mean over classes of 2 sum(hit) / (sum(predicted) + sum(true))

So a metric is a matrix with a row for each question and the function of its column sums. Leaving out or repeating
questions changes the sums alone. Letters: N questions, K columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Goal = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Measure:
    columns: Floats
    """(N, K): what each question adds to the sums."""
    statistic: Callable[[Floats], Any]
    """Sums (..., K) -> values (...)."""
    scores: Floats
    """(N,): the score of each question alone; it decides which questions flipped."""
    goal: Goal = "higher"
    """Whether a higher or a lower value is better."""
    has_grades: bool = False
    """Whether a score may lie between right and wrong, even if none here does."""

    @property
    def num_questions(self) -> int:
        return len(self.scores)

    @property
    def value(self) -> float:
        return float(self.statistic(self.columns.sum(axis=0)))

    @property
    def standard_error(self) -> float | None:
        """The jackknife estimate (Efron and Stein 1981): sqrt((N-1)/N sum_i (v_i - mean v)^2), v_i without question i.

        For a mean it is exactly s / sqrt(N). None for a single question.
        """
        count = self.num_questions
        if count < 2:
            return None
        left = self.statistic(self.columns.sum(axis=0) - self.columns)
        return float(np.sqrt((count - 1) / count * np.square(left - left.mean()).sum()))

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether it is the share of questions with a score of 1, all others having 0."""
        is_mean = self.statistic is _ratio and not self.has_grades and bool(np.all(self.columns[:, 1] == 1))
        return is_mean and bool(np.isin(self.scores, (0.0, 1.0)).all())


def mean_of(scores: Sequence[float], *, goal: Goal = "higher", has_grades: bool = False) -> Measure:
    """The mean score of the questions."""
    values = np.asarray(scores, dtype=np.float64)
    return Measure(np.stack([values, np.ones_like(values)], axis=1), _ratio, values, goal, has_grades)


def perplexity_of(losses: Sequence[float], tokens: Sequence[int]) -> Measure:
    """exp of the mean loss per token. `losses`: the summed negative log-likelihood of each row, in nats."""
    columns = np.stack([np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)], axis=1)
    return Measure(columns, lambda sums: np.exp(_ratio(sums)), columns[:, 0] / columns[:, 1], "lower")


def _ratio(sums: Floats) -> Any:
    return sums[..., 0] / sums[..., 1]
