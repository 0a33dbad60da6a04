"""Packs conversations into rows of up to `cutoff_len` tokens (sft), so that batches have nearly equal sizes.

Best-fit decreasing over the whole dataset: the longest row first, each into the fullest pack that still has room for
it (Johnson et al. 1974, https://epubs.siam.org/doi/10.1137/0203025: at most 11/9 of the fewest packs + 4). n rows are
sorted once, O(n log n); the fullest pack is found in a word of `capacity` bits, one for every amount of free room. The
emptiest packs, of at most 2000 rows, are then packed once more, each as full as its rows allow (by subset sums, the
minimum bin slack of Gupta and Ho 1999), which matters for small datasets.

A pack stores the lengths of its samples (`sample_lengths`), so that attention and positions restart at each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from luthier.data.rows.arrow import flat, from_lists, list_array, row_lengths
from luthier.data.rows.columns import BLOCKS, IDS, IMAGES, LABELS, LENGTHS, WEIGHTS, Column, columns_of_part
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.rows.table import Table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PACKS_PER_BATCH = 100
MAX_REPACKED_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Packs:
    """Rows of several samples, concatenated without padding; ordered by the first sample of each row."""

    size_tokens: int
    columns: ClassVar[tuple[Column, ...]] = columns_of_part("", IDS, LABELS, WEIGHTS, LENGTHS)
    cuts_rows: ClassVar[bool] = False
    is_optional: ClassVar[bool] = True

    def join(self, rows: Table) -> "Iterator[Sequence[pa.ListArray]]":
        import numpy as np

        lengths = row_lengths(rows)
        packs = packs_of(lengths, self.size_tokens)
        sees = IMAGES.name in rows.column_names
        media = (BLOCKS.name, IMAGES.name) if sees else ()
        chosen = rows.select_columns([IDS.name, LABELS.name, WEIGHTS.name, *media])
        for start in range(0, len(packs), PACKS_PER_BATCH):
            batch = packs[start : start + PACKS_PER_BATCH]
            samples = np.concatenate(batch)
            taken = chosen.select(samples).arrow()
            ids, sample_lengths = flat(taken.column(IDS.name))
            labels = flat(taken.column(LABELS.name))[0].copy()
            # The token before the first one of a sample belongs to another sample and must not predict it.
            labels[np.cumsum(sample_lengths) - sample_lengths] = IGNORE_INDEX
            num_samples = np.array([len(pack) for pack in batch])
            num_tokens = np.array([lengths[pack].sum() for pack in batch])
            weights = _joined_weights(*flat(taken.column(WEIGHTS.name)), sample_lengths, num_samples)
            yield (
                list_array(ids, num_tokens),
                list_array(labels, num_tokens),
                list_array(*weights),
                list_array(sample_lengths, num_samples),
                *(_joined_media(taken, sample_lengths, num_samples) if sees else ()),
            )


def _joined_media(
    taken: "pa.Table", sample_lengths: "np.ndarray", num_samples: "np.ndarray"
) -> "tuple[pa.ListArray, pa.ListArray]":
    """The blocks of images of every pack, at their places in the pack, and the images."""
    import numpy as np

    starts = np.cumsum(sample_lengths) - sample_lengths
    firsts = np.cumsum(num_samples) - num_samples
    begins = starts - np.repeat(starts[firsts], num_samples)
    blocks, images = taken.column(BLOCKS.name).to_pylist(), taken.column(IMAGES.name).to_pylist()
    moved = [[int(begin) + place for place in own] for begin, own in zip(begins, blocks, strict=True)]
    packs = [slice(first, first + number) for first, number in zip(firsts, num_samples, strict=True)]
    return (
        from_lists([list(chain.from_iterable(moved[pack])) for pack in packs]),
        from_lists([list(chain.from_iterable(images[pack])) for pack in packs], IMAGES.dtype),
    )


def _joined_weights(
    weights: "np.ndarray", num_weights: "np.ndarray", sample_lengths: "np.ndarray", num_samples: "np.ndarray"
) -> "tuple[np.ndarray, np.ndarray]":
    """(values, lengths) of the weights. A pack has none if none of its samples has; samples without weights get 1."""
    import numpy as np

    if not len(weights):
        return np.zeros(0, np.float32), np.zeros(len(num_samples), np.int64)
    pack_of_sample = np.repeat(np.arange(len(num_samples)), num_samples)
    is_weighed = np.bincount(pack_of_sample, num_weights > 0, len(num_samples)) > 0
    starts = np.cumsum(num_weights) - num_weights
    values = [
        weights[start : start + count] if count else np.ones(length, np.float32)
        for start, count, length, pack in zip(starts, num_weights, sample_lengths, pack_of_sample, strict=True)
        if is_weighed[pack]
    ]
    return np.concatenate(values), np.bincount(pack_of_sample, sample_lengths, len(num_samples)) * is_weighed


def packs_of(lengths: "np.ndarray", capacity: int) -> "list[np.ndarray]":
    """The rows of every pack, ascending; packs by their first row. No length is over `capacity`."""
    import numpy as np

    packs = best_fit(lengths, capacity)
    packs.sort(key=lambda pack: int(lengths[pack].sum()))
    num_rows = np.cumsum([len(pack) for pack in packs])
    num_again = int(np.searchsorted(num_rows, MAX_REPACKED_ROWS, side="right"))
    again = as_full_as_possible([(int(lengths[row]), row) for pack in packs[:num_again] for row in pack], capacity)
    chosen = [*again, *packs[num_again:]] if len(again) <= num_again else packs
    return [np.array(sorted(pack)) for pack in sorted(chosen, key=min)]


def best_fit(lengths: "np.ndarray", capacity: int) -> list[list[int]]:
    """The rows of every pack, by best-fit decreasing."""
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
    return packs


def as_full_as_possible(rows: list[tuple[int, int]], capacity: int) -> list[list[int]]:
    """The rows of every pack, given (length, row): the longest row left, with the rows that fill the pack best."""
    left = sorted(rows, key=lambda pair: (-pair[0], pair[1]))
    packs = []
    while left:
        room = capacity - left[0][0]
        within = (1 << (room + 1)) - 1
        sums = [1]  # bit s of sums[i] is set if some of the i rows after the longest have s tokens in total
        for length, _ in left[1:]:
            sums.append((sums[-1] | sums[-1] << length) & within)
        total = sums[-1].bit_length() - 1
        taken = {0}
        for index in range(len(left) - 1, 0, -1):
            if not sums[index - 1] >> total & 1:
                taken.add(index)
                total -= left[index][0]
        packs.append([left[index][1] for index in taken])
        left = [pair for index, pair in enumerate(left) if index not in taken]
    return packs
