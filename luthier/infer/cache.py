"""The keys and values of a batch whose rows come and go.

All rows share the columns of one cache and end in its last column: a shorter row begins with padding, which the
attention mask hides. T columns, S stored columns of a layer: T, or what a sliding window of W keeps of them (W - 1).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def can_be_shared(cache: Any) -> bool:
    """Whether the state in `cache` is keys and values alone, one column for each token."""
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def join(batch: DynamicCache, newcomer: DynamicCache) -> None:
    """Add the rows of `newcomer` below those of `batch`."""
    num_columns = max(batch.get_seq_length(), newcomer.get_seq_length())
    for mine, theirs in zip(_layers(batch), _layers(newcomer), strict=True):
        stored = _num_stored(mine, num_columns)
        mine.keys = torch.cat([_padded(mine.keys, stored), _padded(theirs.keys, stored)])
        mine.values = torch.cat([_padded(mine.values, stored), _padded(theirs.values, stored)])
        _set_columns(mine, num_columns)


def keep(batch: DynamicCache, rows: list[int], num_columns: int) -> None:
    """Keep these rows, and the last `num_columns` columns: what is before them must be padding in every row."""
    for layer in _layers(batch):
        stored = _num_stored(layer, num_columns)
        layer.keys, layer.values = (_last(states[rows], stored) for states in (layer.keys, layer.values))
        _set_columns(layer, num_columns)


def bytes_per_token(cache: DynamicCache) -> int:
    """The memory of one more column in one row. Layers with a sliding window count in full."""
    states: list[Tensor] = [states for layer in _layers(cache) for states in (layer.keys, layer.values)]
    return sum(s.element_size() * s.shape[1] * s.shape[3] for s in states)


def _layers(cache: DynamicCache) -> list[Any]:
    """Those with keys and values of their own: some layers use those of an earlier one."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.is_initialized]


def _num_stored(layer: Any, num_columns: int) -> int:
    """S for T columns."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(num_columns, layer.sliding_window - 1)
    return num_columns


def _set_columns(layer: Any, num_columns: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = num_columns


def _padded(states: Tensor, stored: int) -> Tensor:
    """(rows, heads, S', dim) -> (rows, heads, S, dim), S' <= S, with zeros in front."""
    return pad(states, (0, 0, stored - states.shape[-2], 0))


def _last(states: Tensor, stored: int) -> Tensor:
    """The last `stored` columns; a slice from `-0` would be all of them."""
    return states[:, :, states.shape[-2] - stored :]
