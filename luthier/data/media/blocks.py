"""The text that a processor writes for an image: its block. It depends on the sizes of images, not on their pixels.

So the processor is asked with black images, once for each size, by its public call with
`return_text_replacement_offsets=True`. No model's arithmetic is repeated here.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError, RowError
from luthier.core.versions import library_version
from luthier.data.media.items import image_tag
from luthier.data.media.reader import Size

if TYPE_CHECKING:
    from luthier.data.chat.encoder import Encoder

MAX_REMEMBERED = 1 << 16
_PROBES: tuple[Size, ...] = ((56, 84), (40, 100), (56, 84))
_UNSUPPORTED: Mapping[str, str] = {
    "PaliGemmaProcessor": "it puts the images in front of the text itself, and takes no conversation",
    "MllamaProcessor": "its images enter by cross attention, whose mask is not made here",
}
"""Class of a processor -> why no model with it can be trained on images yet."""
_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, OSError, AttributeError)


@dataclass(frozen=True, eq=False)
class MediaProcessor:
    """The processor of a model that sees. Raises `ModelError` for one that cannot be used. It can be pickled."""

    processor: Any
    """A `ProcessorMixin`, with the limits of the run set."""
    _known: dict[tuple[Size, ...], tuple[str, ...]] = field(default_factory=dict, repr=False)
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        kind = type(self.processor).__name__
        why = _UNSUPPORTED.get(kind)
        if why is None and not isinstance(getattr(self.processor, "image_token", None), str):
            why = "it has no token that stands for an image"
        if why is not None:
            raise ModelError(f"images: {kind}: {why} -> take another model, or remove the column of images")

    @property
    def mark(self) -> str:
        """What stands for an image in a text that is given to the processor."""
        return str(self.processor.image_token)

    @functools.cached_property
    def reserved(self) -> tuple[str, ...]:
        """Texts that the processor or the model takes for an image, so that no text of data may hold them."""
        own = getattr(self.processor.tokenizer, "image_token", None)
        return tuple(dict.fromkeys(word for word in (self.mark, own) if isinstance(word, str)))

    @functools.cached_property
    def is_joint(self) -> bool:
        """Whether the block of an image depends on the other images of its row, as in LLaVA-OneVision."""
        return self._asked(_PROBES) != tuple(self._asked((size,))[0] for size in _PROBES)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything that decides the blocks."""
        own = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        parts = (type(self.processor).__name__, own, library_version("transformers"), image_tag())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def blocks(self, sizes: Sequence[Size]) -> tuple[str, ...]:
        """The block of each image of a row. Raises `RowError` for a size that the processor refuses."""
        if self.is_joint:
            return self._remembered(tuple(sizes))
        return tuple(self._remembered((size,))[0] for size in sizes)

    def ids(self, encoder: "Encoder", text: str) -> list[int]:
        """The token ids of a block, or of a text around one."""
        found = self._ids.get(text)
        if found is None:
            if len(self._ids) >= MAX_REMEMBERED:
                self._ids.clear()
            found = self._ids[text] = encoder.text(text)
        return found

    def _remembered(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        found = self._known.get(sizes)
        if found is None:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            found = self._known[sizes] = self._asked(sizes)
        return found

    def _asked(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        from PIL import Image

        if not sizes:
            return ()
        black = [Image.new("RGB", (width, height)) for height, width in sizes]
        try:
            answer = self.processor(text=[self.mark * len(sizes)], images=[black], return_text_replacement_offsets=True)
        except _FAULTS as fault:
            shown = ", ".join(f"{height}x{width}" for height, width in sizes)
            reason = " ".join(str(fault).split())
            raise RowError(
                f"{type(self.processor).__name__} refuses an image of {shown} pixels (height x width): {reason}",
                shown,
                reason,
            ) from fault
        (replaced,) = answer["text_replacement_offsets"]
        texts = tuple(str(one["replacement"]) for one in replaced)
        assert len(texts) == len(sizes) and all(map(str.strip, texts)), "a block for each image"
        return texts
