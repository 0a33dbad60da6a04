"""Interleaving row by row is that of whole tables, and the shuffle buffer gives every row once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.interleave import interleaved, shuffled
from luthier.data.mix import mix


def openers(sizes):
    return [lambda size=size: iter(range(size)) for size in sizes]


@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over", "interleave_once"])
@pytest.mark.parametrize("sizes", [(5, 2, 9), (4,), (3, 3), (1, 700)])
def test_turns_are_those_of_the_whole_tables(strategy, sizes):
    assert list(interleaved(openers(sizes), strategy, (), 7)) == list(
        map(tuple, mix(sizes, strategy, None, 7).tolist())
    )


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over", "interleave_once"])
@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.9, 0.05, 0.05)])
def test_drawn_turns_are_those_of_the_whole_tables(strategy, shares):
    sizes = (50, 20, 90)
    order = mix(sizes, strategy, shares, 3).tolist()
    assert list(interleaved(openers(sizes), strategy, shares, 3)) == list(map(tuple, order))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    strategy=st.sampled_from(["interleave_under", "interleave_over", "interleave_once"]),
    seed=st.integers(0, 1000),
)
def test_any_drawn_turns_are_those_of_the_whole_tables(sizes, weights, strategy, seed):
    chosen = weights[: len(sizes)]
    shares = [weight / sum(chosen) for weight in chosen]
    found = list(interleaved(openers(sizes), strategy, shares, seed))
    assert found == list(map(tuple, mix(sizes, strategy, shares, seed).tolist()))


@pytest.mark.parametrize("size", [5, 1000])
def test_a_share_of_nothing_needs_no_rows(size):
    """A dataset may be exhausted by the last draw of a block, of 1000."""
    expected = [(0, row) for row in range(size)]
    assert list(map(tuple, mix((size, 0), "interleave_under", (1.0, 0.0)).tolist())) == expected
    assert list(interleaved(openers((size, 0)), "interleave_under", (1.0, 0.0), 3)) == expected


@pytest.mark.parametrize("strategy", ["interleave_over", "interleave_once"])
def test_a_share_of_nothing_is_refused_where_every_row_is_wanted(strategy):
    with pytest.raises(DataError, match="never exhausts a dataset of probability 0"):
        next(interleaved(openers((5, 5)), strategy, (1.0, 0.0), 3))


def test_a_share_of_nothing_is_never_drawn():
    found = list(interleaved(openers((5, 5)), "interleave_under", (1.0, 0.0), 3))
    assert found == [(0, row) for row in range(5)]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_buffer_gives_every_row_once_and_none_too_early(size):
    found = list(shuffled(range(20), size, np.random.default_rng(0)))
    assert sorted(found) == list(range(20))
    assert all(row < place + size for place, row in enumerate(found))
    assert (found == list(range(20))) == (size == 1)


def test_the_buffer_reads_no_further_than_it_has_to():
    read = []
    rows = (read.append(row) or row for row in range(1000))
    next(shuffled(rows, 8, np.random.default_rng(0)))
    assert len(read) == 8
