"""How a block of tokens is shown: `[image 1: 56x84, 6 tokens]`, with height and width in pixels, or
`[audio 1: 2.5 s, 62 tokens]`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.errors import RowError
from luthier.data.media.kinds import kind_of, path_in
from luthier.data.rows.columns import BLOCKS, IMAGES

Shown = tuple[int, int, str]
"""(start, stop, text) of a block in a row."""


def shown_images(row: Mapping[str, Any]) -> list[Shown]:
    """The blocks of a row, in order. The size is left out for a file that is gone."""
    blocks, items = row.get(BLOCKS.name) or (), row.get(IMAGES.name) or ()
    return [
        (start, stop, f"[{kind_of(item).name} {number}: {_size(item)}{stop - start} token{'s' * (stop - start != 1)}]")
        for number, (start, stop, item) in enumerate(zip(blocks[::2], blocks[1::2], items, strict=True), start=1)
    ]


def between(start: int, stop: int, images: list[Shown]) -> Iterator[tuple[int, int, str]]:
    """(start, stop, text) of the items between two tokens and of the tokens around them, whose text is empty."""
    for first, last, text in images:
        if start <= first and last <= stop:
            if start < first:
                yield start, first, ""
            yield first, last, text
            start = last
    if start < stop:
        yield start, stop, ""


def _size(item: str) -> str:
    kind = kind_of(item)
    try:
        return f"{kind.shown(kind.measured(path_in(item)))}, "
    except RowError:
        return ""
