"""Interleaves datasets of unknown length (`mix_strategy`), and a shuffle buffer.

The order is that of `luthier.data.mix.mix`, with the same random numbers, as long as no row is held out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from luthier.data.mix import DRAWS_PER_BLOCK, MixStrategy, check_probabilities

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")
Opener = Callable[[], Iterator[Item]]
"""Opens a dataset from its first row."""


def interleaved(
    openers: "Sequence[Opener[Item]]", strategy: MixStrategy, probabilities: Sequence[float], seed: int
) -> Iterator[tuple[int, Item]]:
    """(dataset, row) until the strategy is satisfied. Raises `DataError` for probabilities that cannot work."""
    if strategy == "concat":
        yield from ((number, item) for number, opener in enumerate(openers) for item in opener())
    elif probabilities:
        check_probabilities([1] * len(openers), strategy, probabilities)
        yield from _drawn(openers, strategy, probabilities, seed)
    else:
        yield from _cycled(openers, strategy)


def _cycled(openers: "Sequence[Opener[Item]]", strategy: MixStrategy) -> Iterator[tuple[int, Item]]:
    streams = [_Stream(opener) for opener in openers]
    while True:
        if not all(stream.has_next for stream in streams) and strategy == "interleave_under":
            return
        if all(stream.num_ends for stream in streams):
            return
        for number, stream in enumerate(streams):
            if not stream.has_next and strategy == "interleave_over":
                stream.restart()
            if stream.has_next:
                yield number, stream.take()


def _drawn(
    openers: "Sequence[Opener[Item]]", strategy: MixStrategy, probabilities: Sequence[float], seed: int
) -> Iterator[tuple[int, Item]]:
    """A dataset is exhausted by the draw that gives its last row."""
    drawable = [_Stream(opener) if share > 0 else None for opener, share in zip(openers, probabilities, strict=True)]
    streams = [stream for stream in drawable if stream is not None]
    enough = any if strategy == "interleave_under" else all
    for number in _draws(len(openers), probabilities, seed):
        stream = drawable[number]
        assert stream is not None, "nothing of probability 0 is drawn"
        if not stream.has_next and strategy == "interleave_over":
            stream.restart()
        if stream.has_next:
            yield number, stream.take()
        if enough(stream.num_ends > 0 for stream in streams):
            return


def _draws(num_datasets: int, probabilities: Sequence[float], seed: int) -> Iterator[int]:
    import numpy as np

    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(num_datasets, size=DRAWS_PER_BLOCK, p=list(probabilities)).tolist()


class _Stream(Generic[Item]):
    """A dataset that is read one row ahead, so that the last row is recognized."""

    def __init__(self, opener: "Opener[Item]") -> None:
        self._opener = opener
        self.num_ends = 0
        """How often it has been exhausted."""
        self.restart()

    def restart(self) -> None:
        self._rows = self._opener()
        self._advance()

    def _advance(self) -> None:
        found = next(self._rows, self)
        self.has_next = found is not self
        self._next = found

    def take(self) -> Item:
        taken = self._next
        self._advance()
        self.num_ends += not self.has_next
        return taken  # type: ignore[return-value]


def shuffled(rows: Iterable[Item], buffer_size: int, generator: "np.random.Generator") -> Iterator[Item]:
    """Each row once, drawn at random from a buffer of `buffer_size` rows. A buffer of 1 keeps the order."""
    held: list[Item] = []
    for row in rows:
        held.append(row)
        if len(held) >= buffer_size:
            place = int(generator.integers(len(held)))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    for place in generator.permutation(len(held)).tolist():
        yield held[place]
