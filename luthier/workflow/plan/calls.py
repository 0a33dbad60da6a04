"""What one operation of PyTorch computes, reads and writes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_RESERVING = ("empty", "new_empty")
_SELECTING = ("embedding", "index", "index_select", "gather")
"""Operations that read as much as they write, and not all that they are given."""


class Product(NamedTuple):
    """Of two matrices, each either in the order of its rows or transposed."""

    rows: int
    inner: int
    columns: int
    is_left_transposed: bool
    is_right_transposed: bool
    dtype: torch.dtype


class Call(NamedTuple):
    """One operation of PyTorch."""

    operations: int
    """Floating-point operations of products and attention."""
    num_bytes: int
    """Read and written."""
    product: Product | None = None
    decomposed: tuple[int, int] | None = None
    """The shape of a matrix whose singular vectors are computed."""


Calls = Mapping[Call, float]
"""How often each operation is called."""


def call_of(func: Any, args: Sequence[Any], result: Any, num_bytes: int) -> Call:
    """`num_bytes`: what `moved_bytes` says."""
    is_decomposed = func.overloadpacket.__name__ == "_linalg_svd"
    decomposed = tuple(args[0].shape) if is_decomposed else None
    return Call(_operations(func, args, result), num_bytes, _product(func, args), decomposed)


def moved_bytes(func: Any, args: Sequence[Any], results: Sequence[Tensor]) -> int:
    """Read and written; 0 for a view, and for memory that is only reserved."""
    name = func.overloadpacket.__name__
    given = [
        one for arg in args for one in (arg if isinstance(arg, tuple | list) else (arg,)) if isinstance(one, Tensor)
    ]
    written = sum(one.nbytes for one in results)
    places = {one.untyped_storage()._cdata for one in given}
    is_view = not func._schema.is_mutable and all(one.untyped_storage()._cdata in places for one in results)
    if is_view or name.startswith(_RESERVING):
        return 0
    return 2 * written if name in _SELECTING else written + sum(one.nbytes for one in given)


def workspace_bytes(func: Any, args: Sequence[Any]) -> int:
    """What an operation reserves and frees again, beside its results."""
    name = func.overloadpacket.__name__
    if name == "logsumexp":
        return int(args[0].nbytes)  # exp(x - max) of all numbers, before they are added up
    if name == "_linalg_svd":
        # A copy of the matrix, and what LAPACK's divide and conquer (gesdd) asks for with thin results.
        shortest = min(args[0].shape)
        return int(args[0].nbytes + 4 * shortest * (shortest + 2) * args[0].element_size())
    return 0


def _product(func: Any, args: Sequence[Any]) -> Product | None:
    if func.overloadpacket.__name__.rstrip("_") not in ("mm", "addmm"):
        return None
    left, right = args[-2:]
    (rows, inner), columns = left.shape, right.shape[1]
    return Product(rows, inner, columns, left.stride(1) != 1, right.stride(1) != 1, left.dtype)


def _operations(func: Any, args: Sequence[Any], result: Any) -> int:
    """Two per multiplication with addition of matrix products and attention; everything else is small beside these.

    Causal attention computes half of the scores."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name == "_linalg_svd":
        longest, shortest = max(args[0].shape), min(args[0].shape)
        return int(6 * longest * shortest**2 + 20 * shortest**3)  # Golub and Van Loan, table 8.6.1
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left = args[1] if name in ("addmm", "baddbmm") else args[0]
        return int(2 * math.prod(result.shape) * left.shape[-1])
    if name.startswith("_flash_attention"):
        is_backward = name.endswith("backward")
        query, bounds, key_bounds = (args[1], *args[6:8]) if is_backward else (args[0], *args[3:5])
        num_tokens = zip(bounds.diff().tolist(), key_bounds.diff().tolist(), strict=True)
        scores = sum(own * (own + 2 * (keys - own)) for own, keys in num_tokens)
        return int(2 * query.shape[-2] * query.shape[-1] * scores * (2.5 if is_backward else 1))
    if "scaled_dot_product" in name and "attention" in name:
        is_backward = name.endswith("backward")
        query, key = args[1 if is_backward else 0], args[2 if is_backward else 1]
        place = 7 if is_backward else 4
        is_whole = "flash_attention_for_cpu" in name and not any(args[place : place + 1])
        scores = (4 if is_whole else 2) * math.prod(query.shape) * key.shape[-2]
        return int(scores * (2.5 if is_backward else 1))
    return 0
