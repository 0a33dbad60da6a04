"""Sequences of a batch that show the same media, which then pass the encoder of the model once.

    chosen    [image a] ...     sample 0
    chosen    [image b] ...     sample 1
    rejected  [image a] ...     sample 0
    rejected  [image b] ...     sample 1

The batch has the inputs of the distinct samples, and `Sharing` says which of them each sequence shows. The model
computes their features once and gives them to all sequences (`luthier.model.media.towers`). So gradients come
from all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOTHING = -1
"""The sample of a sequence without media."""
_POSITIONS: Mapping[str, str] = {
    "image_grid_thw": "image",
    "video_grid_thw": "video",
    "second_per_grid_ts": "video",
    "video_second_per_grid": "video",
}
"""Input -> the kind of its items. From these a model computes positions, also where the features are given."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which of the distinct samples of a batch each of its sequences shows."""

    order: tuple[int, ...]
    """The sample of each sequence, or `NOTHING`."""
    items: Mapping[str, tuple[int, ...]]
    """Kind -> how many items of it each sample has."""
    vectors: Mapping[str, tuple[int, ...]]
    """Kind -> how many tokens of each sample stand for a vector of its items."""
    stored: Mapping[str, Any] = field(default_factory=dict)
    """Kind -> the form of stored features (`luthier.data.stored_features`), which the batch has in place of pixels."""
    kept: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What frozen encoders made of the samples. It lives as long as the batch, and all parts of the batch have it."""

    @property
    def shown(self) -> tuple[int, ...]:
        """The samples of the sequences with media."""
        return tuple(sample for sample in self.order if sample != NOTHING)

    def part(self, start: int, stop: int) -> "Sharing":
        """Of the sequences from `start` up to `stop`."""
        return replace(self, order=self.order[start:stop])


class SharedMedia:
    """What the model gets in place of pixels. Neither a mapping nor a dataclass: code that wraps a model for several
    processes looks into these."""

    __slots__ = ("media", "sharing")

    def __init__(self, media: "Mapping[str, Tensor]", sharing: Sharing) -> None:
        self.media, self.sharing = media, sharing

    def to(self, device: "torch.device") -> "SharedMedia":
        return SharedMedia({name: values.to(device) for name, values in self.media.items()}, self.sharing)


def positions_of(media: "Mapping[str, Tensor]", sharing: Sharing) -> "dict[str, Tensor]":
    """The inputs for positions, of the items of all sequences; `media` are those of the distinct samples."""
    import torch

    found = {}
    for name, kind in _POSITIONS.items():
        if name in media and sharing.shown:
            samples = media[name].split(list(sharing.items[kind]))
            found[name] = torch.cat([samples[sample] for sample in sharing.shown])
    return found


def shared_inputs(media: "Mapping[str, Tensor]", sharing: Sharing) -> dict[str, Any]:
    """What `forward` takes for the media of sequences that share them; nothing if none of them has any."""
    if not sharing.shown:
        return {}
    return {**positions_of(media, sharing), "shared_media": SharedMedia(media, sharing)}
