"""The images of a run: what makes the pixels of its batches, and whether rows with images can be concatenated."""

import inspect
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.data.media.pixels import Pixels
from luthier.model.modules import unwrap
from luthier.model.multimodal import find_parts, in_parts
from luthier.model.positions import rope_index_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from luthier.data.media.blocks import MediaProcessor
    from luthier.model.attention import Trial
    from luthier.workflow.text import TextSide

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""How models call the argument that tells tokens of text and of images apart."""


def pixels_for(model: "nn.Module", text: "TextSide", *, stands_in: bool = False) -> Pixels | None:
    """What makes the inputs of this model from the images of rows; None for a run without images."""
    return None if text.media is None else pixels_of(model, text.media, stands_in=stands_in)


def pixels_of(model: "nn.Module", media: "MediaProcessor", *, stands_in: bool = False) -> Pixels:
    base = unwrap(model)
    arguments = inspect.signature(base.forward).parameters
    types = next((name for name in TOKEN_TYPES if name in arguments), None)
    return Pixels(media.processor, media.mark, types, rope_index_of(base), stands_in)


def trial_of(text: "TextSide") -> "Trial | None":
    """What a model is tried on, to find out whether rows with images can be concatenated."""
    if text.media is None:
        return None

    def trial(base: Any) -> Any:
        pixels = pixels_for(base, text)
        assert pixels is not None, "the run has images"
        return tuple(
            {name: value.to(base.device) if hasattr(value, "to") else value for name, value in inputs.items()}
            for inputs in pixels.trial()
        )

    return trial


def training_pixels(policy: "nn.Module", text: "TextSide", args: "TrainingArguments") -> Pixels | None:
    """`pixels_for` the policy in training. Where several processes train or share what sees, each batch has an image:
    a process without one would leave out the gradients, or the gathering of weights, that the others wait for."""
    base = unwrap(policy)
    parts = find_parts(base)
    is_sharded = bool(args.fsdp) or args.deepspeed_plugin is not None
    learns = any(
        weight.requires_grad and in_parts(name, (*parts.encoders, *parts.projector))
        for name, weight in base.named_parameters()
    )
    stands_in = args.world_size > 1 and (learns or is_sharded)
    if stands_in and text.media is not None:
        info("a batch without images gets a small black one, since all processes compute what reads images")
    return pixels_for(policy, text, stands_in=stands_in)


def require_same_eyes(name: str, model: "nn.Module", policy: "nn.Module", text: "TextSide") -> None:
    """Raises `ModelError` if another model takes images in another way than the policy, whose batches it gets."""
    if text.media is None:
        return
    own, other = unwrap(policy), unwrap(model)
    kinds = [type(one.config).__name__ for one in (own, other)]
    visions = [getattr(one.config, "vision_config", None) for one in (own, other)]
    sides = [(getattr(vision, "patch_size", None), getattr(vision, "image_size", None)) for vision in visions]
    if kinds[0] != kinds[1] or sides[0] != sides[1]:
        raise ModelError(
            f"{name}: {other.name_or_path} takes images in another way than {own.name_or_path}, and both get the same"
            " batches -> name a model of the same family"
        )
