"""Blocks of images in rows: written in place of `PLACE`, and found again among the tokens.

The rows of an example show its first images: as many as they have places. Blocks go in from left to right in one pass,
since a block may hold the mark of the next one (Gemma 3's does).
"""

import functools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.chat.encoder import TextWithSpans, TurnIds
from luthier.data.chat.render import Turn
from luthier.data.media.blocks import MediaProcessor
from luthier.data.media.reader import Size, size_of
from luthier.data.media.tokens import as_block
from luthier.data.types import PLACE, Span

if TYPE_CHECKING:
    from luthier.data.chat.encoder import Encoder
    from luthier.data.templates import Piece

Written = tuple[Turn, ...] | TextWithSpans
_MEDIA, _NUMBER = "{{media}}", "{{idx}}"
BARE = _MEDIA
"""The slot without a text around the block."""


@functools.cache
def slot_of(multimodal: str) -> str | None:
    """The text around an image in formats of this kind, with `{{media}}` for the block; None if they have none."""
    slots = tomllib.loads((Path(__file__).parent / "slots.toml").read_text("utf-8"))["image"]
    return slots.get(multimodal)


@dataclass(frozen=True, slots=True)
class Block:
    """The block of an image, and the text of the chat format around it."""

    before: str
    text: str
    after: str


@dataclass(frozen=True, slots=True)
class MediaSide:
    """How a run writes images."""

    processor: MediaProcessor
    slot: str = BARE
    """The text around a block."""

    def seen(self, images: Sequence[str]) -> "Seen":
        """The images of an example. Raises `RowError` for one that cannot be read, or that the processor refuses."""
        sizes = tuple(map(size_of, images))
        for path, size in zip(images, sizes, strict=True):
            try:
                self.processor.blocks((size,))
            except RowError as fault:
                raise RowError(f"{path!r}: {fault}", repr(path), *fault.quoted) from fault
        return Seen(self, sizes)


@dataclass(frozen=True, slots=True)
class Seen:
    """The images of one example."""

    side: MediaSide
    sizes: tuple[Size, ...]

    def blocks(self, written: Written) -> list[Block]:
        """The blocks of a row, for its places."""
        num_places = sum(text.count(PLACE) for text in _texts(written))
        texts = self.side.processor.blocks(self.sizes[:num_places])
        found = []
        for number, text in enumerate(texts, start=1):
            before, _, after = self.side.slot.replace(_NUMBER, str(number)).partition(_MEDIA)
            found.append(Block(before, text, after))
        return found

    def require_all(self, written: Written, num_left: int) -> None:
        """Raises `RowError` if truncation left `num_left` images of a row, and the blocks of these are now others."""
        if num_left < len(self.blocks(written)) and self.side.processor.is_joint:
            raise RowError(
                "truncation to cutoff_len would leave out an image, and this model writes other tokens for the others"
                " then -> raise cutoff_len, or lower image_max_pixels"
            )

    def texts(self, written: Written) -> Iterator[str]:
        """What takes the places of a row, in order."""
        for block in self.blocks(written):
            yield block.before + block.text + block.after

    def expanded(self, written: Written) -> Written:
        """The row with its blocks."""
        texts = self.texts(written)
        if isinstance(written, TextWithSpans):
            borders = [Span(0, border, 1.0) for border in written.borders]
            text, moved = expanded_text(written.text, texts, borders)
            return TextWithSpans(text, tuple(span.end for span in moved))
        return tuple(Turn(expanded_pieces(turn.prompt, texts), expanded_pieces(turn.answer, texts)) for turn in written)

    def marked(self, turns: Sequence[TurnIds], written: Written, encoder: "Encoder") -> list[TurnIds]:
        """The turns of a row with its blocks as such. `written`: before they were in it. Raises `RowError`."""
        blocks = self.blocks(written)
        sides = [list(side) for turn in turns for side in turn]
        number = 0
        for ids in sides:
            end = 0
            while number < len(blocks):
                place = self._find(ids, end, blocks[number], encoder)
                if place is None:
                    break
                as_block(ids, *place, number)
                end, number = place[1], number + 1
        if number < len(blocks):
            raise RowError(f"the tokenizer joins the tokens of item {number + 1} of the images with others")
        return list(zip(sides[::2], sides[1::2], strict=True))

    def _find(self, ids: list[int], begin: int, block: Block, encoder: "Encoder") -> tuple[int, int] | None:
        """(start, stop) of the next block from `begin` on, with the slot around it."""
        ids_of = functools.partial(self.side.processor.ids, encoder)
        start = _index(ids, ids_of(block.text.strip()), begin)
        if start is None:
            return None
        stop = start + len(ids_of(block.text.strip()))
        before, after = ids_of(block.before), ids_of(block.after)
        if before and start - len(before) >= begin and ids[start - len(before) : start] == before:
            start -= len(before)
        if after and ids[stop : stop + len(after)] == after:
            stop += len(after)
        return start, stop


def expanded_pieces(pieces: "Sequence[Piece]", texts: Iterator[str]) -> "tuple[Piece, ...]":
    """The pieces with the next of `texts` for each place."""
    return tuple(expanded_text(piece, texts)[0] if isinstance(piece, str) else piece for piece in pieces)


def expanded_text(text: str, texts: Iterator[str], spans: Sequence[Span] = ()) -> tuple[str, list[Span]]:
    """A text with the next of `texts` for each place, and its spans, which hold the same characters as before."""
    if PLACE not in text:
        return text, list(spans)
    parts = text.split(PLACE)
    written, ends = parts[0], []
    for part in parts[1:]:
        block = next(texts)
        ends.append(len(block) - 1)
        written += block + part
    places = [at for at, character in enumerate(text) if character == PLACE]

    def moved(position: int) -> int:
        return position + sum(more for place, more in zip(places, ends, strict=True) if place < position)

    return written, [Span(moved(span.start), moved(span.end), span.weight) for span in spans]


def _texts(written: Written) -> Iterator[str]:
    if isinstance(written, TextWithSpans):
        yield written.text
        return
    for turn in written:
        for piece in (*turn.prompt, *turn.answer):
            if isinstance(piece, str):
                yield piece


def _index(ids: list[int], searched: list[int], begin: int) -> int | None:
    """Where the next `searched` begins."""
    assert searched, "a block is not empty"
    while True:
        try:
            begin = ids.index(searched[0], begin)
        except ValueError:
            return None
        if ids[begin : begin + len(searched)] == searched:
            return begin
        begin += 1
