"""Metrics as functions of sums: their value and standard error."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evals.measure import mean_of, perplexity_of

SCORES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(SCORES)
def test_the_error_of_a_mean_is_the_textbook_one(scores):
    measure = mean_of(scores)
    assert measure.value == pytest.approx(statistics.fmean(scores), abs=1e-9)
    assert measure.standard_error == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)), abs=1e-6)


def test_perplexity_weighs_by_token():
    """Losses of 2 ln 2 and 6 ln 4 over 2 and 6 tokens: exp((2 ln 2 + 6 ln 4) / 8) = 2^(14/8)."""
    measure = perplexity_of([2 * math.log(2), 6 * math.log(4)], [2, 6])
    assert measure.value == pytest.approx(2**1.75)
    assert measure.scores == pytest.approx([math.log(2), math.log(4)])
    assert measure.goal == "lower"


def test_the_error_of_a_perplexity_against_the_delta_method():
    """For many rows the jackknife is PPL sqrt(sum (loss_i - r tokens_i)^2) / sum tokens, with r = ln PPL."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, size=2000)
    losses = tokens * generator.gamma(4, 0.5, size=2000)
    measure = perplexity_of(losses, tokens)
    ratio = losses.sum() / tokens.sum()
    delta = math.exp(ratio) * math.sqrt(np.square(losses - ratio * tokens).sum()) / tokens.sum()
    assert measure.standard_error == pytest.approx(delta, rel=0.01)


def test_one_question_has_no_error():
    assert mean_of([1.0]).standard_error is None


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (mean_of([0, 1, 1]), True),
        (mean_of([0, 0.5]), False),
        (mean_of([0, 0], has_grades=True), False),
        (perplexity_of([1.0, 0.0], [1, 1]), False),
    ],
)
def test_right_or_wrong(measure, expected):
    assert measure.is_right_or_wrong is expected
