"""Rows that join and leave a cache: every row keeps its own keys and values, in the last columns."""

import pytest
import torch
from transformers import LlamaConfig, MambaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from luthier.infer.cache import bytes_per_token, can_be_shared, join, keep
from tests.tiny import TINY_LLAMA

WINDOW = 5


def config(kind):
    return LlamaConfig(**TINY_LLAMA) if kind == "full" else MistralConfig(**{**TINY_LLAMA, "sliding_window": WINDOW})


def filled(kind, num_columns, value):
    """The cache of one row whose keys and values are all `value`."""
    cache = DynamicCache(config=config(kind))
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
