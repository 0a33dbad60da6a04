"""Loops over parts of equal shape. A plan, whose tensors have no data, goes through one and counts it for all."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Repeated = Callable[[int], AbstractContextManager[None]]
"""(n) -> a context in which all that is computed counts n times."""
_repeated: ContextVar[Repeated | None] = ContextVar("repeated", default=None)


@contextmanager
def counted(repeated: Repeated) -> Iterator[None]:
    """While open, `slices` leaves out what only repeats."""
    token = _repeated.set(repeated)
    try:
        yield
    finally:
        _repeated.reset(token)


def slices(num_rows: int, size: int) -> Iterator[slice]:
    """Parts of `size` rows, the last one with what is left.

    In a plan the second one stands for all of this size that follow: the variables of a loop hold what the part before
    has left, and before the first one there is none.
    """
    num_whole, repeated = num_rows // size, _repeated.get()
    first = 0
    if repeated is not None and num_whole > 2:
        yield slice(0, size)
        with repeated(num_whole - 1):
            yield slice(size, 2 * size)
        first = num_whole * size
    for start in range(first, num_rows, size):
        yield slice(start, min(start + size, num_rows))
