"""The difference of two models on the same questions, with its 95 % interval.

Both models answer every question, so what is hard for both cancels: the interval of the paired difference is narrower
than the two standard errors suggest. Its method depends on the scores.

- Right or wrong (0 or 1): the score interval of Tango, Statistics in Medicine 17 (1998), 891-908. b questions became
  right, c became wrong; it holds all differences D that the test
      (b - c - N D) / sqrt(N (2 q + D (1 - D)))        q: the likeliest share of c, if the difference is D
  does not reject. It stays honest with few flips, where a bootstrap of no flips would claim an interval of width 0.
- Other scores: the percentile interval of the paired bootstrap (Efron and Tibshirani 1993, chapter 13; Koehn 2004 for
  BLEU): questions are drawn with replacement, the same for both models, and the differences sorted.

`p` for scores of 0 and 1 is the exact test of McNemar (1947): if no model is better, each flip is a fair coin.
"""

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from luthier.evals.measure import Floats, Measure

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""
NUM_RESAMPLES = 4_000
_CHUNK = 4_000_000
"""Drawn counts in memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    base: float
    tuned: float
    difference: float
    """tuned - base."""
    low: float | None
    """The lower end of the 95 % interval of the difference; None for a single question."""
    high: float | None
    num_questions: int
    num_better: int
    """Questions that the tuned model does better."""
    num_worse: int
    p: float | None
    """Two-sided, for scores of 0 and 1: how likely so unequal flips are if no model is better."""
    method: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def compare(base: Measure, tuned: Measure, seed: int = 42) -> PairedDifference:
    """Question i of both measures is the same question. `seed` is that of the bootstrap."""
    assert base.columns.shape == tuned.columns.shape, "paired measures are of the same questions"
    gains = tuned.scores - base.scores if tuned.goal == "higher" else base.scores - tuned.scores
    num_better, num_worse = int((gains > 0).sum()), int((gains < 0).sum())
    count = base.num_questions
    low: float | None
    high: float | None
    if base.is_right_or_wrong and tuned.is_right_or_wrong:
        low, high = score_interval(num_better, num_worse, count)
        p, method = sign_test(num_better, num_worse), "Tango's score interval"
    else:
        low, high = bootstrap_interval(base, tuned, seed) if count > 1 else (None, None)
        p, method = None, f"paired bootstrap, {NUM_RESAMPLES} resamples, seed {seed}"
    return PairedDifference(
        base=base.value,
        tuned=tuned.value,
        difference=tuned.value - base.value,
        low=low,
        high=high,
        num_questions=count,
        num_better=num_better,
        num_worse=num_worse,
        p=p,
        method=method,
    )


def score_interval(num_better: int, num_worse: int, num_questions: int) -> tuple[float, float]:
    """Tango's 95 % interval of the difference of two shares of N questions."""
    assert 0 <= num_better + num_worse <= num_questions > 0
    high = _upper_end(num_better, num_worse, num_questions)
    return -_upper_end(num_worse, num_better, num_questions), high


def _upper_end(gains: int, losses: int, count: int) -> float:
    """The largest difference that is not rejected, by bisection."""
    inside, outside = (gains - losses) / count, 1.0
    for _ in range(60):
        middle = (inside + outside) / 2
        if _z(gains, losses, count, middle) >= -Z_95:
            inside = middle
        else:
            outside = middle
    return inside


def _z(gains: int, losses: int, count: int, difference: float) -> float:
    """The test statistic of the module's docstring. q solves 2N q^2 + linear q + constant = 0."""
    linear = -gains - losses + (2 * count - gains + losses) * difference
    constant = -losses * difference * (1 - difference)
    q = (sqrt(max(0.0, linear**2 - 8 * count * constant)) - linear) / (4 * count)
    variance = count * (2 * q + difference * (1 - difference))
    distance = gains - losses - count * difference
    if variance <= 0:
        return 0.0 if distance == 0 else inf * distance
    return distance / sqrt(variance)


def sign_test(num_better: int, num_worse: int) -> float:
    """The exact two-sided p of McNemar's test: b + c fair coins that fall at least as unequally."""
    flips = num_better + num_worse
    tail, ways = 0, 1  # ways: binomial coefficient of flips over k
    for k in range(min(num_better, num_worse) + 1):
        tail += ways
        ways = ways * (flips - k) // (k + 1)
    return min(1.0, 2 * tail / 2**flips)


def bootstrap_interval(base: Measure, tuned: Measure, seed: int) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the difference over resampled questions.

    Questions that add the same to all sums are drawn together, so short tests of thousands of rows stay quick.
    """
    rows, counts = np.unique(np.concatenate([base.columns, tuned.columns], axis=1), axis=0, return_counts=True)
    width, shares = base.columns.shape[1], counts / counts.sum()
    generator = np.random.default_rng(seed)
    differences: list[Floats] = []
    chunk = max(1, _CHUNK // len(rows))
    for start in range(0, NUM_RESAMPLES, chunk):
        size = min(chunk, NUM_RESAMPLES - start)
        sums = generator.multinomial(base.num_questions, shares, size=size) @ rows
        differences.append(tuned.statistic(sums[:, width:]) - base.statistic(sums[:, :width]))
    low, high = np.quantile(np.concatenate(differences), (0.025, 0.975))
    return float(low), float(high)
