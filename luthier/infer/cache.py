"""The keys and values of a batch whose rows come and go.

All rows share the columns of one cache and end in its last column: a shorter row begins with padding, which the
attention mask hides. T columns, S stored columns of a layer: T, or what a sliding window of W keeps of them (W - 1).

The layers of transformers copy all columns at each step. Those of `new_cache` stand in memory with room for the next
columns, so that a step writes one column and copies nothing.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MIN_ROOM = 64
"""Columns that are added to the memory of a layer when it is full, or an eighth of those it has."""


class Columns:
    """(rows, heads, columns, dim) states that grow by columns."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._end = 0

    def add(self, states: Tensor, new: Tensor) -> Tensor:
        """`states` and, behind them, the columns of `new`. `states`: what the last call returned, or the last columns
        of it; anything else after `forget`."""
        num_old, num_new = states.shape[-2], new.shape[-2]
        if self._memory is None or self._end + num_new > self._memory.shape[-2]:
            room = num_new + max(MIN_ROOM, num_old // 8)
            self._memory = new.new_empty((*new.shape[:2], num_old + room, new.shape[-1]))
            self._memory[:, :, :num_old] = states
            self._end = num_old
        self._memory[:, :, self._end : self._end + num_new] = new
        self._end += num_new
        return self._memory[:, :, self._end - num_new - num_old : self._end]

    def keep(self, num_rows: int) -> None:
        """Only the first rows go on."""
        if self._memory is not None:
            self._memory = self._memory[:num_rows]

    def forget(self) -> None:
        """The states are replaced: they are copied at the next call."""
        self._memory = None


class GrowingLayer(DynamicLayer):
    """Attention to all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms = Columns(), Columns()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = _added(self, key_states, value_states)
        return self.keys, self.values


class GrowingWindowLayer(DynamicSlidingWindowLayer):
    """Attention to the last W tokens."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.rooms = Columns(), Columns()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = _added(self, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        stored = min(keys.shape[-2], self.sliding_window - 1)
        self.keys, self.values = _last(keys, stored), _last(values, stored)
        return keys, values


def _added(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values of the layer, these included."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
        return keys, values
    room_of_keys, room_of_values = layer.rooms
    return room_of_keys.add(layer.keys, keys), room_of_values.add(layer.values, values)


def new_cache(config: "PretrainedConfig") -> DynamicCache:
    """An empty cache for the model of this config, which `can_be_shared`."""
    cache = DynamicCache(config=config)
    layers: list[Any] = cache.layers
    cache.layers = [
        GrowingWindowLayer(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else GrowingLayer()
        for layer in layers
    ]
    return cache


def can_be_shared(cache: Any) -> bool:
    """Whether the state in `cache` is keys and values alone, one column for each token."""
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def has_windows(cache: DynamicCache) -> bool:
    """Whether a layer does not attend to all tokens."""
    return any(type(layer) is not GrowingLayer for layer in cache.layers)


def join(batch: DynamicCache, newcomer: DynamicCache) -> None:
    """Add the rows of `newcomer` below those of `batch`."""
    num_columns = max(batch.get_seq_length(), newcomer.get_seq_length())
    for mine, theirs in zip(_layers(batch), _layers(newcomer), strict=True):
        stored = _num_stored(mine, num_columns)
        keys, values = (
            torch.cat([_padded(upper, stored), _padded(lower, stored)])
            for upper, lower in ((mine.keys, theirs.keys), (mine.values, theirs.values))
        )
        _replace(mine, keys, values, num_columns)


def keep(batch: DynamicCache, rows: list[int], num_columns: int) -> None:
    """Keep these rows, and the last `num_columns` columns: what is before them must be padding in every row.

    If each row stays in its place or comes from behind the last place, only such a row is copied.
    """
    moved = [(place, row) for place, row in enumerate(rows) if row != place]
    in_place = all(row >= len(rows) for _, row in moved) and len({row for _, row in moved}) == len(moved)
    for layer in _layers(batch):
        stored = _num_stored(layer, num_columns)
        keys, values = _last(layer.keys, stored), _last(layer.values, stored)
        if not in_place:
            _replace(layer, keys[rows], values[rows], num_columns)
            continue
        for states in (keys, values):
            for place, row in moved:
                states[place] = states[row]
        layer.keys, layer.values = keys[: len(rows)], values[: len(rows)]
        for room in layer.rooms:
            room.keep(len(rows))
        _note_columns(layer, num_columns)


def filled_up(live: list[int]) -> list[int]:
    """The same rows, in an order in which those from behind fill the places of those that have left."""
    staying = [row for row in live if row < len(live)]
    moving, free = iter(live[len(staying) :]), set(range(len(live))) - set(staying)
    return [next(moving) if place in free else place for place in range(len(live))]


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


def _replace(layer: Any, keys: Tensor, values: Tensor, num_columns: int) -> None:
    layer.keys, layer.values = keys, values
    for room in layer.rooms:
        room.forget()
    _note_columns(layer, num_columns)


def _note_columns(layer: Any, num_columns: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = num_columns


def _padded(states: Tensor, stored: int) -> Tensor:
    """(rows, heads, S', dim) -> (rows, heads, S, dim), S' <= S, with zeros in front."""
    return pad(states, (0, 0, stored - states.shape[-2], 0))


def _last(states: Tensor, stored: int) -> Tensor:
    """The last `stored` columns; a slice from `-0` would be all of them."""
    return states[:, :, states.shape[-2] - stored :]
