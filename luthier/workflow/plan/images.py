"""The images, videos and audio of the largest batch: their pixels, and what the encoders take that read them.

The processor makes the pixels of that batch as it does in training. Then the encoders and the projector run on tensors
without data, as the language model does (`luthier.workflow.plan.trace`), and the traces become one:

    forward     encoder, whose activations stay if it learns; then the language model beside them
    backward    the language model, then the encoder beside all gradients of the language model
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from luthier.data.collate import repeated
from luthier.data.media.kinds import by_kind
from luthier.data.pixels import SOUND_OF_VIDEOS, Pixels
from luthier.data.rows.columns import BLOCKS, IMAGES, parts_of
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.modules import unwrap
from luthier.model.multimodal import find_parts, in_parts
from luthier.workflow.plan.calls import Call
from luthier.workflow.plan.counter import StepCounter
from luthier.workflow.plan.trace import Substitutes, Trace

if TYPE_CHECKING:
    from luthier.data.media.blocks import MediaProcessor

aten = torch.ops.aten
_ENCODERS = {"images": "get_image_features", "videos": "get_video_features", "audio": "get_audio_features"}
"""What the function of a model is called that reads items of a kind."""


@dataclass(frozen=True, slots=True)
class Images:
    """The items of one batch."""

    plurals: tuple[str, ...]
    """Of their kinds: images, videos, audio."""
    number: int
    num_tokens: int
    """Of the blocks of all parts."""
    inputs: Mapping[str, Tensor]
    """What the model takes for them; numbers are on the `meta` device, sizes and grids are not."""

    @property
    def named(self) -> str:
        """images, videos"""
        return ", ".join(self.plurals)

    @property
    def pixel_bytes(self) -> int:
        return sum(values.nbytes for values in self.inputs.values())


@dataclass(frozen=True, slots=True)
class Seeing:
    """What encoder and projector take for a batch, beside weights and pixels."""

    early_bytes: int
    """The most in the forward pass."""
    kept_bytes: int
    """What is left of it for the backward pass."""
    late_bytes: int
    """The most in the backward pass, with all gradients of the language model; 0 if neither of them learns."""
    calls: Mapping[Call, float]


def images_of(
    rows: Sequence[Mapping[str, Any]], media: "MediaProcessor | None", num_parts: int | None, dtype: torch.dtype
) -> Images | None:
    """The items of the rows of a batch; None if they have none, or if the model reads text only.

    Raises `DataError` for a file that cannot be read.
    """
    items = [item for row in rows for item in row[IMAGES.name]]
    if media is None or not items:
        return None
    parts = parts_of(rows[0])[:num_parts]
    inputs = repeated(Pixels(media.processor, tuple(media.marks), dtype=dtype).inputs(rows), len(parts))
    blocks = [row[part + BLOCKS.name] for row in rows for part in parts]
    num_tokens = sum(sum(bounds[1::2]) - sum(bounds[::2]) for bounds in blocks)
    plurals = tuple(kind.plural for kind in by_kind(items))
    if SOUND_OF_VIDEOS in inputs and "audio" not in plurals:
        plurals = (*plurals, "audio")
    return Images(plurals, len(items), num_tokens, {name: _without_data(values) for name, values in inputs.items()})


def _without_data(values: Tensor) -> Tensor:
    return torch.empty_like(values, device="meta") if values.is_floating_point() else values


def trace_images(
    model: nn.Module, images: Images, *, half: torch.dtype | None, recomputes: bool, use_reentrant: bool = True
) -> Seeing:
    """With all activations kept, or with every layer computed again. `model` is on the `meta` device, in training mode,
    and without checkpointing. `use_reentrant`: as for `enable_checkpointing`."""
    if recomputes:
        model = deepcopy(model)
        enable_checkpointing(unwrap(model), use_reentrant=use_reentrant)
    base = unwrap(model)
    counter = _ImageCounter(model, images.inputs.values())
    with torch.autocast("cpu", dtype=half, enabled=half is not None), Substitutes(half), counter:
        vectors = list(vectors_of(base, images))
        num_forward, kept = counter.num_calls, counter.live_bytes
        learns = any(one.requires_grad for one in vectors)
        if learns:
            torch.autograd.backward([one.float().sum() for one in vectors])
    parts = find_parts(base)
    others = 0
    for name, weight in base.named_parameters():
        if weight.requires_grad and not in_parts(name, (*parts.encoders, *parts.projector)):
            others += weight.nbytes
        weight.grad = None
    early, late = counter.history[:num_forward], counter.history[num_forward:]
    return Seeing(max(early, default=0), kept, max(late) + others if learns else 0, counter.calls)


def vectors_of(base: Any, images: Images) -> Iterator[Tensor]:
    """What the encoders make of the items of a batch. Raises `AttributeError` if the class has no function for a kind,
    as that of Qwen2-Audio."""
    for plural in images.plurals:
        encode = getattr(base, _ENCODERS[plural])
        taken = inspect.signature(encode).parameters
        found = encode(**{name: values for name, values in images.inputs.items() if name in taken}, return_dict=True)
        # The class of Llama 4 calls its projector apart, and an encoder of audio has one inside.
        pooled = getattr(found, "pooler_output", None)
        features = found.last_hidden_state if pooled is None else pooled
        yield from features if isinstance(features, list | tuple) else [features]


def with_images(step: Trace, seeing: Seeing, images: Images) -> Trace:
    """The trace of a step of the language model, with its images."""
    return replace(
        step,
        early_bytes=max(seeing.early_bytes, step.early_bytes + seeing.kept_bytes) + images.pixel_bytes,
        late_bytes=max(seeing.late_bytes, step.late_bytes + seeing.kept_bytes) + images.pixel_bytes,
        calls=dict(Counter(step.calls) + Counter(seeing.calls)),
    )


class _ImageCounter(StepCounter):
    """Sizes and grids are real numbers here, as long as they meet no tensor without data. Pixels are counted apart."""

    def __init__(self, model: nn.Module, given: Iterable[Tensor]) -> None:
        super().__init__(model)
        self.known |= {values.untyped_storage()._cdata for values in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if not any(one.is_meta for one in tensors):
            return func(*args, **kwargs)
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        if func is aten.index.Tensor:
            args = (args[0], [number for index in args[1] for number in _numbers(index)])
        args, kwargs = tree_map_only(Tensor, lambda one: one if one.is_meta else one.to("meta"), (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _numbers(index: Tensor | None) -> Sequence[Tensor | None]:
    """What a mask chooses, as numbers on each of its dimensions. Without its data, all items count as chosen."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if not index.is_meta:
        return index.nonzero(as_tuple=True)
    return [torch.empty(index.numel(), dtype=torch.long, device="meta") for _ in range(index.ndim)]
