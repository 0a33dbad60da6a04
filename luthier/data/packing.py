"""Conversations put together into rows of up to `cutoff_len` tokens (sft), so that no batch has much less than another.

Best-fit decreasing over the whole dataset: the longest row first, each into the fullest pack that still has room for
it (Johnson et al. 1974, https://epubs.siam.org/doi/10.1137/0203025: at most 11/9 of the fewest packs + 4). n rows are
sorted once, O(n log n); the fullest pack is found in a word of `capacity` bits, one for every amount of free room.

A pack knows where its samples begin (`sample_lengths`), so that attention and positions start anew at each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from luthier.data.labels import IGNORE_INDEX
from luthier.data.tables import flat, list_array, row_lengths

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

PACKS_PER_BATCH = 100


class Packer(Protocol):
    """Joins tokenised rows into longer ones; its `repr` tells it apart from others."""

    columns: ClassVar[tuple[str, ...]]
    cuts_rows: ClassVar[bool]
    """Whether rows of any length can be joined, so that they need not be cut to `cutoff_len` before."""

    @property
    def size_tokens(self) -> int:
        """Most tokens of a joined row."""
        ...

    def join(self, rows: "datasets.Dataset") -> "Iterator[Sequence[pa.ListArray]]":
        """Batches of joined rows, one array per column."""
        ...


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows of samples that lie behind one another, in the order of the first sample of each."""

    size_tokens: int
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "sample_lengths")
    cuts_rows: ClassVar[bool] = False

    def join(self, rows: "datasets.Dataset") -> "Iterator[Sequence[pa.ListArray]]":
        import numpy as np

        lengths = row_lengths(rows)
        packs = best_fit(lengths, self.size_tokens)
        arrow = rows.select_columns(["input_ids", "labels"]).with_format("arrow")
        for start in range(0, len(packs), PACKS_PER_BATCH):
            batch = packs[start : start + PACKS_PER_BATCH]
            samples = np.concatenate(batch)
            taken = arrow[samples]
            ids, sample_lengths = flat(taken.column("input_ids"))
            labels = flat(taken.column("labels"))[0].copy()
            # What the first token of a sample follows is another sample, which does not tell it.
            labels[np.cumsum(sample_lengths) - sample_lengths] = IGNORE_INDEX
            num_samples = np.array([len(pack) for pack in batch])
            num_tokens = np.array([lengths[pack].sum() for pack in batch])
            yield list_array(ids, num_tokens), list_array(labels, num_tokens), list_array(sample_lengths, num_samples)


def best_fit(lengths: "np.ndarray", capacity: int) -> "list[np.ndarray]":
    """The rows of every pack, ascending; packs by their first row. No length is over `capacity`."""
    import numpy as np

    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set if a pack has room for r more tokens
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            packs[pack].append(row)
        else:
            assert length <= capacity, "rows are cut to the capacity before they are packed"
            pack, room = len(packs), capacity
            packs.append([row])
        left = room - length
        by_room.setdefault(left, []).append(pack)
        rooms |= 1 << left
    return [np.array(sorted(pack)) for pack in sorted(packs, key=min)]
