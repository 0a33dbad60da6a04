"""The media of a run: what makes the inputs of its batches, and whether rows with media can be concatenated."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.data.collate import TYPE_KEYS, Layout, concatenate_rows, model_inputs
from luthier.data.media.kinds import Loaded, Shape, listens_to_videos, media_kind
from luthier.data.pixels import Pixels, Sample
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.media.positions import rope_index_of
from luthier.model.media.towers import sharing_fault
from luthier.model.modules import unwrap
from luthier.model.multimodal import BOUNDS, find_parts, in_parts
from luthier.training.distributed.sums import to_device

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainingArguments

    from luthier.config.runs import TrainRun
    from luthier.data.media.blocks import MediaProcessor
    from luthier.model.attention import Trial
    from luthier.stages import Stage
    from luthier.workflow.text import TextSide

_TRIED = {
    "image": (Shape("image", (28, 56)), Shape("image", (56, 84))),
    "video": (
        Shape("video", (56, 56, 4, 2.0, 2.0, 16_000, 0, 1, 2, 3)),
        Shape("video", (56, 84, 4, 2.0, 2.0, 12_000, 0, 1, 2, 3)),
    ),
    "audio": (Shape("audio", (4_000, 16_000)), Shape("audio", (6_000, 16_000))),
}
"""Two items of each kind; videos with sound, for a processor that listens to them."""


def pixels_for(model: "nn.Module", text: "TextSide", *, stands_in: bool = False) -> Pixels | None:
    """What makes the inputs of this model from the media of rows; None for a run without media."""
    return None if text.media is None else pixels_of(model, text.media, stands_in=stands_in)


def pixels_of(model: "nn.Module", media: "MediaProcessor", *, stands_in: bool = False) -> Pixels:
    base = unwrap(model)
    arguments = inspect.signature(base.forward).parameters
    types = next((name for name in TYPE_KEYS if name in arguments), None)
    tokens = {kind: getattr(base.config, f"{kind}_token_id", None) for kind in _TRIED}
    return Pixels(
        media.processor,
        tuple(media.marks),
        types,
        rope_index_of(base),
        base.dtype,
        stands_in,
        {kind: token for kind, token in tokens.items() if token is not None},
    )


def trial_of(text: "TextSide") -> "Trial | None":
    """What a model is tried on, to find out whether rows with media can be concatenated."""
    if text.media is None:
        return None

    def trial(base: Any) -> Any:
        pixels = pixels_for(base, text)
        assert pixels is not None, "the run has media"
        return tuple(to_device(inputs, base.device) for inputs in samples_with_media(pixels))

    return trial


def samples_with_media(pixels: Pixels) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the model for a row with an item of each kind: alone, and concatenated with another one before it."""
    before, after = _two_samples(pixels)
    found = []
    for chosen in ([after], [before, after]):
        media, written = pixels.processed(chosen)
        batch = concatenate_rows([_row(blocks, pixels) for blocks in written])
        batch |= pixels.token_inputs(batch, media)
        found.append(model_inputs({**batch, "media": media, "media_parts": 1}))
    alone, both = found
    return {name: value for name, value in alone.items() if name not in BOUNDS}, both


def rows_that_share(pixels: Pixels, layout: Layout, device: "torch.device") -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the model for three rows, of which the first and the last show the same items: each with items of its
    own, and with shared ones."""
    first, second = _two_samples(pixels)
    whole, written = pixels.processed([first, second, first])
    distinct, _ = pixels.processed([first, second])
    rows = [_row(blocks, pixels, num_questions=number) for number, blocks in enumerate(written, 1)]
    batch = layout(rows)
    batch |= pixels.token_inputs(batch, whole)
    samples = [
        Sample(
            tuple(media_kind(name).item(f"{number}") for name in pixels.kinds),
            tuple(tuple(pixels.ids(block)) for block in blocks),
        )
        for number, blocks in enumerate(written[:2])
    ]
    apart = to_device({**batch, "media": whole, "media_parts": 1}, device)
    shared = to_device({**batch, "media": distinct, "sharing": pixels.sharing(samples, (0, 1, 0))}, device)
    return model_inputs(apart), model_inputs(shared)


def _two_samples(pixels: Pixels) -> tuple[list[Loaded], list[Loaded]]:
    """With an item of each kind."""
    first, second = ([_noise(shapes, number, pixels) for shapes in _tried(pixels)] for number in (0, 1))
    return first, second


def _row(blocks: Sequence[str], pixels: Pixels, num_questions: int = 1) -> dict[str, Any]:
    """A row without labels that asks several times about an item of each kind."""
    words = pixels.ids("What is this?")
    seen = [(*pixels.framed(name, block), *words) for name, block in zip(pixels.kinds, blocks, strict=True)]
    ids = [*words, *(token for tokens in seen for token in tokens), *words * (num_questions - 1)]
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}


def _tried(pixels: Pixels) -> list[tuple[Shape, Shape]]:
    return [_TRIED[name] for name in pixels.kinds]


def _noise(shapes: tuple[Shape, Shape], number: int, pixels: Pixels) -> Loaded:
    shape = shapes[number]
    return Loaded(shape.kind, media_kind(shape.kind).noise(shape.size, pixels.processor))


def training_pixels(policy: "nn.Module", text: "TextSide", args: "TrainingArguments") -> Pixels | None:
    """`pixels_for` the policy in training. Where several processes train or share what sees or hears, each batch has an
    item of each kind of the data: a process without one would leave out the gradients, or the gathering of weights,
    that the others wait for."""
    base = unwrap(policy)
    parts = find_parts(base)
    is_sharded = bool(args.fsdp) or args.deepspeed_plugin is not None
    learns = any(
        weight.requires_grad and in_parts(name, (*parts.encoders, *parts.projector))
        for name, weight in base.named_parameters()
    )
    stands_in = args.world_size > 1 and (learns or is_sharded)
    if stands_in and text.media is not None:
        kinds = " or ".join(media_kind(name).plural for name in text.media.marks)
        info(f"a batch without {kinds} gets a small one without content, since all processes compute what reads them")
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


def shared_by_rows(
    run: "TrainRun",
    stage: "Stage",
    models: "Mapping[str, nn.Module]",
    pixels: Pixels,
    layout: Layout,
    args: "TrainingArguments",
) -> Pixels:
    """`pixels` that give the media of a batch once for all sequences that show them, if all models can share these.

    `models`: those that get the batches, by their names. Tried only if the stage puts a prompt into several sequences,
    or if features are kept. Raises `ModelError` if they cannot be kept.
    """
    keeps = run.finetuning.cache_media_features
    reason = None if keeps or run.model.fast_path else "fast_path is false"
    if not keeps and not _repeats_prompts(run, stage):
        return pixels
    if "audio" in pixels.kinds or listens_to_videos(pixels.processor):
        reason = "no model takes features of audio"
    elif args.deepspeed_plugin is not None or args.torch_compile:
        reason = "DeepSpeed and torch_compile run the model as it is"
    for name, model in models.items():
        if reason is None:
            trial = partial(_sharing_trial, pixels, layout)
            fault = sharing_fault(model, trial, draws=stage.has_dropout)
            reason = None if fault is None else f"{name}: {fault}"
    kinds = " and ".join(media_kind(name).plural for name in pixels.kinds)
    if reason is not None and keeps:
        raise ModelError(f"cache_media_features: {reason} -> leave cache_media_features out")
    if reason is not None:
        info(f"{kinds} are encoded for each row that shows them: {reason}")
        return pixels
    info(f"{kinds} are encoded once for all rows of a batch that show them")
    return replace(pixels, shares=True)


def _sharing_trial(pixels: Pixels, layout: Layout, base: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return rows_that_share(pixels, layout, base.device)


def _repeats_prompts(run: "TrainRun", stage: "Stage") -> bool:
    """Whether several sequences of a batch show the same media: two answers, a mismatched pair, sampled answers."""
    plan = stage.rollout(run.method)
    has_pairs = len(stage.rows.parts) > 1 or stage.num_learned_parts is not None
    return has_pairs or (plan is not None and plan.num_generations > 1)
