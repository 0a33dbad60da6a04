"""How a block of tokens of an image is shown: `[image 1: 56x84, 6 tokens]`, with height and width in pixels."""

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.errors import RowError
from luthier.data.media.reader import size_of
from luthier.data.rows.columns import BLOCKS, IMAGES

Shown = tuple[int, int, str]
"""(start, stop, text) of a block in a row."""


def shown_images(row: Mapping[str, Any]) -> list[Shown]:
    """The blocks of a row, in order. The size is left out for a file that is gone."""
    blocks, paths = row.get(BLOCKS.name) or (), row.get(IMAGES.name) or ()
    return [
        (start, stop, f"[image {number}: {_size(path)}{stop - start} token{'s' * (stop - start != 1)}]")
        for number, (start, stop, path) in enumerate(zip(blocks[::2], blocks[1::2], paths, strict=True), start=1)
    ]


def between(start: int, stop: int, images: list[Shown]) -> Iterator[tuple[int, int, str]]:
    """(start, stop, text) of the images between two tokens and of the tokens around them, whose text is empty."""
    for first, last, text in images:
        if start <= first and last <= stop:
            if start < first:
                yield start, first, ""
            yield first, last, text
            start = last
    if start < stop:
        yield start, stop, ""


def _size(path: str) -> str:
    try:
        height, width = size_of(path)
    except RowError:
        return ""
    return f"{height}x{width}, "
