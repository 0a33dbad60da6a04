"""Rows that join and leave a cache: every row keeps its own keys and values, in the last columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MambaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from luthier.infer.cache import MIN_ROOM, bytes_per_token, can_be_shared, filled_up, join, keep, new_cache
from tests.tiny import TINY_LLAMA

WINDOW = 5


def config(kind):
    return LlamaConfig(**TINY_LLAMA) if kind == "full" else MistralConfig(**{**TINY_LLAMA, "sliding_window": WINDOW})


def filled(kind, num_columns, value):
    """The cache of one row whose keys and values are all `value`."""
    cache = new_cache(config(kind))
    for layer in cache.layers:
        layer.update(torch.full((1, 2, num_columns, 16), value), torch.full((1, 2, num_columns, 16), -value))
    return cache


def rows_of(cache):
    """The stored values of each row, column by column."""
    return cache.layers[0].keys[:, 0, :, 0].tolist()


@pytest.mark.parametrize("lengths", [(2, 4), (4, 2), (3, 3)])
def test_a_shorter_row_begins_with_padding(lengths):
    cache = filled("full", lengths[0], 1.0)
    join(cache, filled("full", lengths[1], 2.0))
    width = max(lengths)
    assert rows_of(cache) == [[0.0] * (width - n) + [v] * n for n, v in zip(lengths, (1.0, 2.0), strict=True)]
    assert cache.get_seq_length() == width


@pytest.mark.parametrize(("lengths", "stored"), [((2, 9), 4), ((9, 2), 4), ((7, 9), 4), ((2, 3), 3)])
def test_a_sliding_window_keeps_what_it_sees_and_counts_all(lengths, stored):
    cache = filled("sliding", lengths[0], 1.0)
    join(cache, filled("sliding", lengths[1], 2.0))
    for row, (length, value) in zip(rows_of(cache), zip(lengths, (1.0, 2.0), strict=True), strict=True):
        own = min(length, stored)
        assert row == [0.0] * (stored - own) + [value] * own
    assert cache.get_seq_length() == max(lengths)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_row_that_leaves_takes_its_columns_along(kind):
    cache = filled(kind, 9, 1.0)
    join(cache, filled(kind, 3, 2.0))
    keep(cache, [1], 3)
    alone = filled(kind, 3, 2.0)
    assert rows_of(cache) == rows_of(alone) and cache.get_seq_length() == 3
    assert [layer.values.shape for layer in cache.layers] == [layer.values.shape for layer in alone.layers]


def test_a_token_takes_keys_and_values_in_every_layer():
    num_layers, heads, dim = 2, 2, 16
    assert bytes_per_token(filled("full", 3, 1.0)) == num_layers * 2 * heads * dim * 4


def test_only_keys_and_values_can_be_shared():
    assert can_be_shared(DynamicCache(config=config("full"))) and can_be_shared(DynamicCache(config=config("sliding")))
    assert not can_be_shared(None)
    assert not can_be_shared(DynamicCache(config=MambaConfig(num_hidden_layers=2)))


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_growing_layers_hold_what_those_of_transformers_hold(kind):
    """Column by column over several times the room, with rows that join and leave between."""
    ours, theirs = new_cache(config(kind)), DynamicCache(config=config(kind))
    rng = torch.Generator().manual_seed(0)

    def both(num_rows, num_new):
        for mine, expected in zip(ours.layers, theirs.layers, strict=True):
            new = torch.randn(num_rows, 2, num_new, 16, generator=rng)
            assert mine.get_mask_sizes(num_new) == expected.get_mask_sizes(num_new)
            for got, wanted in zip(mine.update(new, -new), expected.update(new, -new), strict=True):
                assert torch.equal(got, wanted)
            assert torch.equal(mine.keys, expected.keys) and torch.equal(mine.values, expected.values)
        assert ours.get_seq_length() == theirs.get_seq_length()

    both(2, 3)
    for _ in range(2 * MIN_ROOM):
        both(2, 1)
    for rows in ([1, 1, 0], [0, 2], [1], [0, 0, 0, 0, 0], [0, 4, 3], [0, 1]):
        keep(ours, rows, ours.get_seq_length())
        theirs.batch_select_indices(torch.tensor(rows))
        for _ in range(MIN_ROOM + 2 if rows[0] else 5):
            both(len(rows), 1)
    both(2, 1)
    keep(ours, [0, 1, 1], ours.get_seq_length())
    theirs.batch_select_indices(torch.tensor([0, 1, 1]))
    both(3, 7)


def test_a_step_copies_no_column_while_there_is_room():
    cache = filled("full", 3, 1.0)
    for _ in range(2):
        for layer in cache.layers:
            layer.update(*torch.zeros(2, 1, 2, 1, 16))
    before = cache.layers[0].keys.data_ptr()
    for layer in cache.layers:
        layer.update(*torch.zeros(2, 1, 2, 1, 16))
    assert cache.layers[0].keys.data_ptr() == before


@given(st.integers(1, 9), st.sets(st.integers(0, 8)))
def test_rows_from_behind_fill_the_places_of_those_that_left(num_rows, gone):
    live = [row for row in range(num_rows) if row not in gone]
    order = filled_up(live)
    assert sorted(order) == live
    assert all(row == place or row >= len(live) for place, row in enumerate(order))


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_row_that_leaves_moves_one_row_at_most(kind):
    cache = filled(kind, 3, 1.0)
    for value in (2.0, 3.0, 4.0):
        join(cache, filled(kind, 3, value))
    layer = cache.layers[0]
    layer.update(*torch.full((2, 4, 2, 1, 16), 9.0))
    before = layer.keys.data_ptr()
    keep(cache, filled_up([0, 2, 3]), 4)
    assert layer.keys.data_ptr() == before and [row[0] for row in rows_of(cache)] == [1.0, 4.0, 3.0]
    layer.update(*torch.full((2, 3, 2, 1, 16), 8.0))
    assert layer.keys.shape[0] == 3 and (kind == "sliding" or layer.keys.data_ptr() == before)
