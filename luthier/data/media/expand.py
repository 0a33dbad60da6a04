"""Blocks of media in rows: written in place of the characters in `PLACES`, and found again among the tokens.

The rows of an example show its first items: as many as they have places. Blocks go in from left to right in one pass,
since a block may hold the mark of the next one (Gemma 3's does).
"""

import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.chat.encoder import TextWithSpans, TurnIds
from luthier.data.chat.render import Turn
from luthier.data.media.blocks import MediaProcessor
from luthier.data.media.kinds import Examined, kind_of, path_in
from luthier.data.media.tokens import as_block
from luthier.data.types import PLACES, Span

if TYPE_CHECKING:
    from luthier.data.chat.encoder import Encoder
    from luthier.data.templates import Piece

Written = tuple[Turn, ...] | TextWithSpans
_MEDIA, _NUMBER = "{{media}}", "{{idx}}"
BARE = _MEDIA
"""The slot without a text around the block."""
_PLACE = re.compile(f"[{''.join(PLACES)}]")


@functools.cache
def slots_of(multimodal: str) -> Mapping[str, str]:
    """Name of a kind -> the text around an item in formats of this `multimodal`, with `{{media}}` for the block."""
    tables = tomllib.loads((Path(__file__).parent / "slots.toml").read_text("utf-8"))
    return {kind: slots[multimodal] for kind, slots in tables.items() if multimodal in slots}


@dataclass(frozen=True, slots=True)
class Block:
    """The block of an item, and the text of the chat format around it."""

    before: str
    text: str
    after: str


@dataclass(frozen=True, slots=True)
class MediaSide:
    """How a run writes media."""

    processor: MediaProcessor
    slots: Mapping[str, str] = field(default_factory=dict)
    """Name of a kind -> the text around a block; `BARE` for those that are not here."""

    def seen(self, items: Sequence[str], found: Sequence[Examined | RowError] | None = None) -> "Seen":
        """The items of an example. `found`: what is known of each, or why it cannot be used; if not given, it is read.

        Raises `RowError` for one that cannot be read, or that the processor refuses.
        """
        if self.processor.is_apart and {"image", "video"} <= {kind_of(item).name for item in items}:
            raise RowError("the model takes images or videos, not both at once")
        examined = tuple(map(self.processor.examined, items) if found is None else map(_usable, found))
        for item, known in zip(items, examined, strict=True):
            try:
                self.processor.blocks((known.shape,))
            except RowError as fault:
                path = repr(path_in(item))
                raise RowError(f"{path}: {fault}", path, *fault.quoted) from fault
        return Seen(self, tuple(items), examined)


@dataclass(frozen=True)
class Seen:
    """The items of one example, in the order of their places."""

    side: MediaSide
    items: tuple[str, ...]
    examined: tuple[Examined, ...]

    def blocks(self, written: Written) -> list[Block]:
        """The blocks of a row, for its places."""
        num_places = sum(len(_PLACE.findall(text)) for text in _texts(written))
        shapes = [known.shape for known in self.examined[:num_places]]
        found, numbers = [], Counter[str]()
        for shape, text in zip(shapes, self.side.processor.blocks(shapes), strict=True):
            numbers[shape.kind] += 1
            slot = self.side.slots.get(shape.kind, BARE)
            before, _, after = slot.replace(_NUMBER, str(numbers[shape.kind])).partition(_MEDIA)
            found.append(Block(before, text, after))
        return found

    @functools.cached_property
    def left(self) -> list[RowError]:
        """For each item of which the model takes a part only: what it leaves out."""
        found = []
        processor = self.side.processor.processor
        for item, known in zip(self.items, self.examined, strict=True):
            reason, *quoted = kind_of(item).left(known.measure, processor)
            if reason:
                path = path_in(item)
                found.append(RowError(f"{path!r} {reason}", repr(path), *quoted))
        return found

    def require_all(self, written: Written, num_left: int) -> None:
        """Raises `RowError` if truncation left `num_left` items of a row, and the blocks of these are now others."""
        if self.side.processor.is_joint and num_left < len(self.blocks(written)):
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
            raise RowError(f"the tokenizer joins the tokens of item {number + 1} of the media with others")
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
    places = [match.start() for match in _PLACE.finditer(text)]
    if not places:
        return text, list(spans)
    parts = _PLACE.split(text)
    written, ends = parts[0], []
    for part in parts[1:]:
        block = next(texts)
        ends.append(len(block) - 1)
        written += block + part

    def moved(position: int) -> int:
        return position + sum(more for place, more in zip(places, ends, strict=True) if place < position)

    return written, [Span(moved(span.start), moved(span.end), span.weight) for span in spans]


def _usable(found: Examined | RowError) -> Examined:
    if isinstance(found, RowError):
        raise found
    return found


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
