"""Paired differences: intervals by hand, from the literature, by another program, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evals.measure import mean_of, perplexity_of
from luthier.evals.metrics import Classes
from luthier.evals.paired import Z_95, bootstrap_interval, compare, score_interval, sign_test

FLIPS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 300)).filter(lambda t: t[0] + t[1] <= t[2])


def test_questions_by_hand():
    """Six questions, three flips: two became right, one became wrong. p = 2 (1 + 3) / 2^3 = 1."""
    found = compare(mean_of([0, 0, 1, 1, 0, 1]), mean_of([1, 1, 0, 1, 0, 1]))
    assert (found.base, found.tuned, found.difference) == pytest.approx((3 / 6, 4 / 6, 1 / 6))
    assert (found.num_questions, found.num_better, found.num_worse, found.p) == (6, 2, 1, 1.0)
    assert found.low < 0 < found.high
    assert not found.is_clear


def test_no_flips_by_hand():
    """With b = c = 0 the squared test is N D / (1 - D), so D = z^2 / (N + z^2): never an interval of width 0."""
    low, high = score_interval(0, 0, 100)
    assert high == pytest.approx(Z_95**2 / (100 + Z_95**2), abs=1e-12)
    assert low == -high


def test_the_literature():
    """Airway data, 21 pairs, 1 and 7 discordant: Fagerland, Lydersen and Laake 2014 give -0.517 to -0.026."""
    assert score_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert sign_test(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)


@pytest.mark.parametrize("flips", [(5, 2, 30), (0, 4, 50), (40, 12, 200), (9, 9, 18)])
def test_against_a_likelihood_maximised_by_scipy(flips):
    """The interval inverts the score test, whose q is the likeliest share of losses for a given difference.

    Here q is found by maximising the likelihood b log(q + D) + c log q + (N - b - c) log(1 - 2q - D), not by a formula.
    """
    optimize = pytest.importorskip("scipy.optimize")
    gains, losses, count = flips
    same = count - gains - losses

    def z(difference):
        def minus_likelihood(q):
            parts = ((gains, q + difference), (losses, q), (same, 1 - 2 * q - difference))
            return -sum(n * math.log(max(share, 1e-300)) for n, share in parts if n)

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        q = optimize.minimize_scalar(minus_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        variance = count * (2 * q + difference - difference**2)
        return (gains - losses - count * difference) / math.sqrt(variance)

    middle = (gains - losses) / count
    low = optimize.brentq(lambda d: z(d) - Z_95, -0.999, middle + 1e-9)
    high = optimize.brentq(lambda d: z(d) + Z_95, middle - 1e-9, 0.999)
    assert score_interval(*flips) == pytest.approx((low, high), abs=1e-5)


@given(FLIPS)
def test_the_interval_holds_the_difference_and_mirrors(flips):
    gains, losses, count = flips
    low, high = score_interval(gains, losses, count)
    assert -1 <= low <= (gains - losses) / count <= high <= 1
    assert score_interval(losses, gains, count) == (-high, -low)


@given(st.integers(1, 400), st.integers(0, 400))
def test_the_interval_agrees_with_mcnemar(gains, losses):
    """At D = 0 its test is that of McNemar, (b - c) / sqrt(b + c)."""
    low, high = score_interval(gains, losses, 1000)
    rejects = abs(gains - losses) / math.sqrt(gains + losses) > Z_95
    assert (low > 0 or high < 0) == rejects


@pytest.mark.parametrize("flips", [(0, 0), (3, 0), (1, 7), (10, 10), (600, 500), (5000, 5300)])
def test_p_against_scipy(flips):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(flips[0], sum(flips)).pvalue if any(flips) else 1.0
    assert sign_test(*flips) == pytest.approx(expected, rel=1e-8)


def test_the_bootstrap_against_scipy():
    """The same percentile interval, drawn by another program: equal within the noise of 4000 resamples."""
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    base = generator.gamma(2, 1, size=200)
    tuned = base * 0.8 + generator.gamma(2, 0.3, size=200)
    other = stats.bootstrap(
        (tuned - base,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    ours = bootstrap_interval(mean_of(base), mean_of(tuned), 3)
    tolerance = 0.15 * np.std(tuned - base) / math.sqrt(200)  # 4 errors of a quantile of 4000 draws
    assert ours == pytest.approx((other.low, other.high), abs=tolerance)


def test_the_bootstrap_is_seeded():
    base, tuned = mean_of(np.arange(30) / 30), mean_of(np.sqrt(np.arange(30)) / 5)
    assert compare(base, tuned, 7) == compare(base, tuned, 7)
    assert compare(base, tuned, 7).low != compare(base, tuned, 8).low
    assert compare(base, tuned).p is None


def test_perplexity_by_hand():
    """Every token of the tuned model costs ln 2 less, so every resample halves the perplexity of 8."""
    found = compare(
        perplexity_of([3 * math.log(8), 5 * math.log(8)], [3, 5]),
        perplexity_of([3 * math.log(4), 5 * math.log(4)], [3, 5]),
    )
    assert (found.base, found.tuned, found.difference) == pytest.approx((8, 4, -4))
    assert (found.low, found.high) == pytest.approx((-4, -4))
    assert (found.num_better, found.num_worse) == (2, 0)
    assert found.is_clear


def test_classes_are_resampled_by_question():
    references = ["a", "b"] * 50
    base, tuned = Classes(["a"] * 100, references), Classes(references, references)
    found = compare(base.measure("class_f1"), tuned.measure("class_f1"))
    assert found.difference == pytest.approx(1 - (2 / 3) / 2)
    assert 0.6 < found.low < found.difference < found.high < 0.75
    assert (found.num_better, found.num_worse) == (50, 0)


def test_one_question_has_no_interval():
    found = compare(mean_of([0.5]), mean_of([0.7]))
    assert (found.low, found.high, found.is_clear) == (None, None, False)


def test_coverage():
    """Of 2000 data sets of 80 questions, 95 % of the intervals hold the true difference 0.25 - 0.1."""
    generator = np.random.default_rng(5)
    drawn = generator.multinomial(80, (0.25, 0.1, 0.65), size=2000)
    holds = [low <= 0.15 <= high for low, high in (score_interval(int(b), int(c), 80) for b, c, _ in drawn)]
    assert np.mean(holds) == pytest.approx(0.95, abs=0.015)
