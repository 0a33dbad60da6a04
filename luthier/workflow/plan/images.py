"""The images of the largest batch: their pixels, and what the encoder takes that reads them.

The processor makes the pixels of that batch as it does in training. Then the encoder and the projector run on tensors
without data, as the language model does (`luthier.workflow.plan.trace`), and the two traces become one:

    forward     encoder, whose activations stay if it learns; then the language model beside them
    backward    the language model, then the encoder beside all gradients of the language model
"""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.data.collate import repeated
from luthier.data.pixels import Pixels
from luthier.data.rows.columns import BLOCKS, IMAGES, parts_of
from luthier.model.modules import unwrap
from luthier.workflow.plan.trace import Call, StepCounter, Substitutes, Trace

if TYPE_CHECKING:
    from luthier.data.media.blocks import MediaProcessor


@dataclass(frozen=True, slots=True)
class Images:
    """Of one batch."""

    number: int
    num_tokens: int
    """Of the blocks of all parts."""
    inputs: Mapping[str, Tensor]
    """What the model takes for them; numbers are on the `meta` device, sizes and grids are not."""

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
    """The most in the backward pass; 0 if neither of them learns."""
    calls: Mapping[Call, float]


def images_of(rows: Sequence[Mapping[str, Any]], media: "MediaProcessor", num_parts: int) -> Images | None:
    """Those of the rows of a batch; None if they have none. Raises `DataError` for one that cannot be read."""
    number = sum(len(row[IMAGES.name]) for row in rows)
    if not number:
        return None
    inputs = repeated(Pixels(media.processor, media.mark).inputs(rows), num_parts)
    parts = parts_of(rows[0])[:num_parts]
    blocks = [row[part + BLOCKS.name] for row in rows for part in parts]
    num_tokens = sum(sum(bounds[1::2]) - sum(bounds[::2]) for bounds in blocks)
    return Images(number, num_tokens, {name: _without_data(values) for name, values in inputs.items()})


def _without_data(values: Tensor) -> Tensor:
    return torch.empty_like(values, device="meta") if values.is_floating_point() else values


def trace_images(model: nn.Module, images: Images, *, half: torch.dtype | None) -> Seeing:
    """`model` is on the `meta` device, in training mode."""
    base = unwrap(model)
    taken = inspect.signature(base.get_image_features).parameters  # type: ignore[arg-type]
    given = {name: values for name, values in images.inputs.items() if name in taken}
    counter = _ImageCounter(model, given.values())
    with torch.autocast("cpu", dtype=half, enabled=half is not None), Substitutes(half), counter:
        found = base.get_image_features(**given, return_dict=True)  # type: ignore[operator]
        features = found.pooler_output
        vectors = list(features) if isinstance(features, list | tuple) else [features]
        del found, features
        num_forward, kept = counter.num_calls, counter.live_bytes
        if any(one.requires_grad for one in vectors):
            torch.autograd.backward([one.float().sum() for one in vectors])
    for weight in model.parameters():
        weight.grad = None
    early, late = counter.history[:num_forward], counter.history[num_forward:]
    return Seeing(max(early, default=0), kept, max(late, default=0), counter.calls)


def with_images(step: Trace, images: Images, seeing: Seeing, gradients_bytes: int) -> Trace:
    """The trace of a step of the language model, with its images. `gradients_bytes`: of all trained weights."""
    late = step.late_bytes + seeing.kept_bytes
    if seeing.late_bytes:
        late = max(late, gradients_bytes + seeing.late_bytes)
    return replace(
        step,
        early_bytes=max(seeing.early_bytes, step.early_bytes + seeing.kept_bytes) + images.pixel_bytes,
        late_bytes=late + images.pixel_bytes,
        calls=dict(Counter(step.calls) + Counter(seeing.calls)),
    )


class _ImageCounter(StepCounter):
    """Sizes and grids are real numbers here, and pixels are counted apart."""

    def __init__(self, model: nn.Module, given: Any) -> None:
        super().__init__(model)
        self.known |= {values.untyped_storage()._cdata for values in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)
