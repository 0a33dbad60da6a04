"""The order of mixed datasets: small cases by hand, and every strategy against the library `datasets`."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.mix import mix, sample_rows, split_validation

STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def order(*arguments, **options):
    return [tuple(pair) for pair in mix(*arguments, **options).tolist()]


def test_concat_is_one_after_the_other():
    assert order([2, 0, 1], "concat") == [(0, 0), (0, 1), (2, 0)]


def test_turns_by_hand():
    assert order([1, 2], "interleave_under") == [(0, 0), (1, 0)]
    assert order([1, 2], "interleave_over") == [(0, 0), (1, 0), (0, 0), (1, 1)]
    assert order([1, 2], "interleave_once") == [(0, 0), (1, 0), (1, 1)]


def test_empty_probabilities_mean_turns():
    assert order([1, 2], "interleave_once", ()) == order([1, 2], "interleave_once")


@pytest.mark.parametrize("strategy", STOPPING)
@pytest.mark.parametrize("probabilities", [None, [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("lengths", [[3, 4, 5], [1, 7, 2], [40, 1500, 900]])
@pytest.mark.parametrize("seed", [0, 42])
def test_same_order_as_the_library(strategy, probabilities, lengths, seed):
    from datasets import Dataset, interleave_datasets

    tables = [Dataset.from_dict({"d": [index] * size, "r": list(range(size))}) for index, size in enumerate(lengths)]
    theirs = interleave_datasets(tables, probabilities, seed=seed, stopping_strategy=STOPPING[strategy])
    assert order(lengths, strategy, probabilities, seed) == list(zip(theirs["d"], theirs["r"], strict=True))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    drawn=st.booleans(),
)
def test_what_each_strategy_promises(lengths, weights, seed, drawn):
    total = sum(weights[: len(lengths)])
    probabilities = [weight / total for weight in weights[: len(lengths)]] if drawn else None
    every_row = {(dataset, row) for dataset, size in enumerate(lengths) for row in range(size)}

    def counts(strategy):
        return Counter(order(lengths, strategy, probabilities, seed))

    assert counts("concat") == counts("interleave_once") == Counter(every_row)
    assert set(counts("interleave_over")) == every_row
    under = counts("interleave_under")
    taken = Counter(dataset for dataset, _ in under.elements())
    assert any(taken[dataset] >= size for dataset, size in enumerate(lengths))
    assert max(under.values()) == 1


@pytest.mark.parametrize(
    ("lengths", "strategy", "probabilities", "reason"),
    [
        ([1, 2], "interleave_under", [1.0], "1 numbers .* for 2 datasets"),
        ([1, 2], "interleave_under", [0.5, 0.6], "not probabilities"),
        ([1, 2], "interleave_under", [-0.5, 1.5], "not probabilities"),
        ([1, 2], "interleave_over", [0.0, 1.0], "never exhausts"),
        ([1, 2], "interleave_once", [0.0, 1.0], "never exhausts"),
        ([0, 2], "interleave_under", [0.5, 0.5], "dataset 1 has no rows"),
        ([0, 2], "interleave_over", None, "cannot repeat a dataset without rows"),
    ],
)
def test_impossible_mixtures(lengths, strategy, probabilities, reason):
    with pytest.raises(DataError, match=reason):
        mix(lengths, strategy, probabilities)


def test_probability_zero_may_stand_under():
    assert {dataset for dataset, _ in order([3, 2], "interleave_under", [0.0, 1.0])} == {1}


@pytest.mark.parametrize("val_size", [0.1, 0.25, 3])
def test_validation_rows_are_those_of_the_library(val_size):
    from datasets import Dataset

    theirs = Dataset.from_dict({"r": list(range(37))}).train_test_split(test_size=val_size, seed=7)
    train, evaluation = split_validation(np.arange(37), val_size, 7)
    assert (train.tolist(), evaluation.tolist()) == (theirs["train"]["r"], theirs["test"]["r"])


@pytest.mark.parametrize(("val_size", "num_eval"), [(0.01, 1), (0.5, 5), (1, 1), (1.0, 1), (4, 4)])
def test_val_size_is_a_share_below_one_and_a_count_from_one(val_size, num_eval):
    train, evaluation = split_validation(np.arange(10), val_size, 0)
    assert len(evaluation) == num_eval
    assert sorted([*train, *evaluation]) == list(range(10))


@pytest.mark.parametrize(("num_rows", "val_size"), [(1, 0.1), (5, 5), (5, 9)])
def test_no_row_left_to_train_on(num_rows, val_size):
    with pytest.raises(DataError, match="leaves none to train on"):
        split_validation(np.arange(num_rows), val_size, 0)


@given(num_rows=st.integers(1, 30), num_samples=st.integers(1, 90), seed=st.integers(0, 99))
def test_samples_repeat_only_beyond_the_rows(num_rows, num_samples, seed):
    sample = sample_rows(num_rows, num_samples, seed).tolist()
    assert len(sample) == num_samples and set(sample) <= set(range(num_rows))
    assert len(set(sample[:num_rows])) == min(num_rows, num_samples)
    assert sample == sample_rows(num_rows, num_samples, seed).tolist()


def test_no_rows_no_samples():
    assert sample_rows(0, 3, 0).tolist() == []
