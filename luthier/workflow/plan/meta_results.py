"""What operations return on `meta`, found quicker than PyTorch does: it decomposes many of them in Python, which takes
0.3 to 1 ms, and the layers of a model repeat the same ones.

A result in new memory depends on the shape, the strides and the format of the tensors that are given, so it is found
once for each of these. An operation that writes into a given tensor returns that tensor.
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_OF_NO_DATA = torch.device("meta")


class _Kind(NamedTuple):
    """What a result depends on of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        made: Tensor = torch.ops.aten.empty_strided.default(
            self.shape, self.strides, dtype=self.dtype, device=_OF_NO_DATA
        )
        return made


class _Typed(NamedTuple):
    """Any other argument; 1, 1.0 and True are equal without their type."""

    type: type
    value: Any


class _Unknown(Exception):
    """A tensor with data, or one that is laid out otherwise."""


def result_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """As `func(*args, **kwargs)`."""
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    if not _returns_new_memory(func):
        return func(*args, **kwargs)
    try:
        kinds = _kinds_of_results(func, _kind(args), tuple((name, _kind(value)) for name, value in kwargs.items()))
    except (_Unknown, TypeError):  # or an argument without a hash
        return func(*args, **kwargs)
    if kinds is None:
        return func(*args, **kwargs)
    if isinstance(kinds, _Kind):
        return kinds.make()
    made = [kind.make() for kind in kinds]
    return made if isinstance(kinds, list) else tuple(made)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that the operation writes into and returns; None if it does otherwise."""
    place = _place_written(func)
    if place is None:
        return None
    tensor = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place))
    return tensor if isinstance(tensor, Tensor) and tensor.is_meta and tensor.numel() else None


@cache
def _place_written(func: Any) -> int | str | None:
    """Position or name of the only argument that is written, if the operation returns it with its shape."""
    schema = func._schema
    written = [
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    is_returned = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
    return written[0] if len(written) == 1 and is_returned and torch.Tag.inplace_view not in func.tags else None


@cache
def _returns_new_memory(func: Any) -> bool:
    schema = func._schema
    return bool(schema.returns) and all(one.alias_info is None for one in (*schema.arguments, *schema.returns))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta or value.layout is not torch.strided:
            raise _Unknown
        return _Kind(value.shape, value.stride(), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return _Typed(type(value), value)


def _given(kind: Any) -> Any:
    """An argument of this kind."""
    if isinstance(kind, _Kind):
        return kind.make()
    return kind.value if isinstance(kind, _Typed) else tuple(map(_given, kind))


@lru_cache(maxsize=4096)
def _kinds_of_results(func: Any, args: Any, kwargs: Any) -> "_Kind | tuple[_Kind, ...] | list[_Kind] | None":
    """None if not all results are tensors, each in memory of its own and of its size."""
    given, named = _given(args), {name: _given(kind) for name, kind in kwargs}
    result = func(*given, **named)
    results = result if isinstance(result, tuple | list) else (result,)
    # `_unsafe_view` says that it returns new memory.
    taken = {_place(one) for one in tree_leaves((given, named)) if isinstance(one, Tensor)}
    kinds = []
    for one in results:
        if not isinstance(one, Tensor) or _place(one) in taken:
            return None
        taken.add(_place(one))
        kinds.append(_kind(one))
        if kinds[-1].make().untyped_storage().nbytes() != one.untyped_storage().nbytes():
            return None
    return kinds[0] if isinstance(result, Tensor) else type(result)(kinds)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
