"""Prompts with media: their token ids as in training, and the tensors that the model takes beside them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import InvalidInput, RowError
from luthier.data.chat.encoder import Encoder, TextWithSpans
from luthier.data.chat.render import Turn
from luthier.data.media.expand import MediaSide
from luthier.data.media.kinds import by_kind, kind_of
from luthier.data.media.tokens import blocks_in
from luthier.data.pixels import Pixels, Prompts
from luthier.data.templates import Piece

if TYPE_CHECKING:
    from torch import Tensor


class SeenPrompt(list[int]):
    """The ids of a prompt with media."""

    items: tuple[str, ...]
    """See `luthier.data.media.kinds`."""
    blocks: tuple[int, ...]
    """Where the tokens of each begin and end: start, stop, start, stop, ..."""

    def inputs(self, pixels: Pixels) -> "dict[str, Tensor]":
        """What the model takes beside the ids. Raises `DataError` for a file that has changed meanwhile."""
        import torch

        row = {"input_ids": list(self), "images": self.items, "blocks": self.blocks}
        return Prompts(pixels, [row]).inputs([0], torch.tensor([list(self)]))


def seen_prompt(
    pieces: "Sequence[Piece]", items: Sequence[str], media: MediaSide | None, encoder: Encoder
) -> SeenPrompt:
    """The ids of a prompt that has a place for each item.

    Raises `InvalidInput` for a model that does not take items of a kind, and for one that cannot be read.
    """
    for kind in by_kind(items):
        if media is None or kind.name not in media.processor.marks:
            raise InvalidInput(f"this model does not read {kind.plural}, or its processor could not be loaded")
    assert media is not None, "a prompt with media has items"
    written = (Turn(tuple(pieces), ()),)
    try:
        seen = media.seen(items)
        whole = seen.expanded(written)
        assert not isinstance(whole, TextWithSpans), "turns stay turns"
        ((ids, _),) = seen.marked([(encoder.pieces(whole[0].prompt), [])], written, encoder)
    except RowError as fault:
        raise InvalidInput(f"{kind_of(items[0]).name}: {fault}") from fault
    prompt = SeenPrompt(map(int, ids))
    prompt.items = tuple(items)
    prompt.blocks = tuple(place for _, start, stop in blocks_in(ids) for place in (start, stop))
    return prompt
