"""The text that a processor writes for an item of media: its block. It depends on the item's shape, not on its content.

So the processor is asked with black images, black frames and silence, once for each shape, by its public call with
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
from luthier.data.media.kinds import (
    Examined,
    Loaded,
    Shape,
    arguments_for,
    examined,
    listens_to_videos,
    marks_of,
    media_kind,
    media_kinds,
)

if TYPE_CHECKING:
    from luthier.data.chat.encoder import Encoder

MAX_REMEMBERED = 1 << 16
_PROBES = (*(Shape("image", size) for size in ((56, 84), (40, 100), (56, 84))),)
_UNSUPPORTED: Mapping[str, str] = {
    "PaliGemmaProcessor": "it adds tokens to each prompt itself, and takes no row without an image",
    "MllamaProcessor": "its images enter by cross attention, which needs a mask of tokens, images and tiles",
    "VoxtralProcessor": "its chat template is part of the library mistral_common, and takes no text here",
    "GraniteSpeechProcessor": "its model switches on an adapter of its own for audio, which is not trained here",
}
"""Class of a processor -> why no model with it can be trained on media yet."""
_APART = ("Glm4vProcessor", "Glm46VProcessor", "SmolVLMProcessor")
"""Their models take the pixels of images or those of videos, not both at once: videos are written with the token of
images, or have the same name as an input."""
_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, OSError, AttributeError)


def require_supported(name: str | None, needs: Sequence[str] = ()) -> None:
    """Raises `ModelError` for a class of processors that cannot be used. `needs`: the kinds in the data."""
    if name is not None and name in _UNSUPPORTED:
        raise _unusable(name, _UNSUPPORTED[name], (*needs, "image")[0])


def _unusable(name: str, why: str, kind: str) -> ModelError:
    plural = media_kind(kind).plural
    return ModelError(f"{plural}: {name}: {why} -> take another model, or remove the column of {plural}")


@dataclass(frozen=True, eq=False)
class MediaProcessor:
    """The processor of a model that takes images, videos or audio. It can be pickled.

    Raises `ModelError` for one that cannot be used, or that takes not all of the kinds it needs to.
    """

    processor: Any
    """A `ProcessorMixin`, with the limits of the run set."""
    needs: tuple[str, ...] = ()
    """The names of the kinds that it has to take; none: at least one of all."""
    _known: dict[tuple[Shape, ...], tuple[str, ...]] = field(default_factory=dict, repr=False)
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        name = type(self.processor).__name__
        require_supported(name, self.needs)
        known = marks_of(self.processor)
        missing = [kind for kind in self.needs or (() if known else ("image",)) if kind not in known]
        if missing:
            raise _unusable(name, f"it has no token that stands for {media_kind(missing[0]).noun}", missing[0])
        if self.is_apart and {"image", "video"} <= set(self.needs):
            raise ModelError(
                f"images, videos: {name}: its model takes one of the two in a batch -> train on them in two runs, or"
                " take another model"
            )

    @property
    def is_apart(self) -> bool:
        """Whether images and videos cannot be in one batch."""
        return type(self.processor).__name__ in _APART

    @functools.cached_property
    def marks(self) -> Mapping[str, str]:
        """Name of a kind -> what stands for an item of it in a text that is given to the processor."""
        found = marks_of(self.processor)
        return {name: mark for name, mark in found.items() if not self.needs or name in self.needs}

    @functools.cached_property
    def reserved(self) -> Mapping[str, str]:
        """Texts that the processor or the model takes for an item, so that no text of data may hold them -> the name of
        its kind."""
        own = {getattr(self.processor.tokenizer, f"{name}_token", None): name for name in self.marks}
        found = {mark: name for mark, name in own.items() if isinstance(mark, str)}
        return {mark: name for name, mark in self.marks.items()} | found

    @functools.cached_property
    def is_joint(self) -> bool:
        """Whether the block of an image depends on the other images of its row, as in LLaVA-OneVision."""
        if "image" not in self.marks:
            return False
        return self._asked(_PROBES) != tuple(self._asked((shape,))[0] for shape in _PROBES)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything that decides the blocks."""
        own = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        tags = [kind.written_tag for kind in media_kinds()]
        listens = ("sound of videos",) if listens_to_videos(self.processor) else ()
        parts = (type(self.processor).__name__, own, library_version("transformers"), tags, *listens)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def examined(self, item: str) -> Examined:
        """The file is read the first time. Raises `RowError`."""
        return examined(item, self.processor)

    def blocks(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        """The block of each item of a row. Raises `RowError` for a shape that the processor refuses."""
        if self.is_joint:
            return self._remembered(tuple(shapes))
        return tuple(self._remembered((shape,))[0] for shape in shapes)

    def ids(self, encoder: "Encoder", text: str) -> list[int]:
        """The token ids of a block, or of a text around one."""
        found = self._ids.get(text)
        if found is None:
            if len(self._ids) >= MAX_REMEMBERED:
                self._ids.clear()
            found = self._ids[text] = encoder.text(text)
        return found

    def _remembered(self, shapes: tuple[Shape, ...]) -> tuple[str, ...]:
        found = self._known.get(shapes)
        if found is None:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            found = self._known[shapes] = self._asked(shapes)
        return found

    def _asked(self, shapes: tuple[Shape, ...]) -> tuple[str, ...]:
        if not shapes:
            return ()
        blank = [Loaded(shape.kind, media_kind(shape.kind).blank(shape.size, self.processor)) for shape in shapes]
        shown = ", ".join(media_kind(shape.kind).shown(shape.size) for shape in shapes)
        what = f"{media_kind(shapes[0].kind).noun} of {shown}{media_kind(shapes[0].kind).unit}"
        name = type(self.processor).__name__
        try:
            answer = self.processor(
                text=["".join(self.marks[shape.kind] for shape in shapes)],
                return_text_replacement_offsets=True,
                **arguments_for([blank], self.processor),
            )
        except _FAULTS as fault:
            reason = " ".join(str(fault).split())
            raise RowError(f"{name} refuses {what}: {reason}", shown, reason) from fault
        (replaced,) = answer["text_replacement_offsets"]
        texts = tuple(str(one["replacement"]) for one in replaced)
        assert len(texts) == len(shapes), "a block for each item"
        if not all(map(str.strip, texts)):
            raise RowError(f"{name} writes no token for {what}", shown)
        return texts
