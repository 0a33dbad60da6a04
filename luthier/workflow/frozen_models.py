"""Frozen models such as a reference or a teacher: loaded, and passed to the loss."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from luthier.config.runs import TrainRun
from luthier.data.collate import Layout, concatenate_rows
from luthier.data.prepare import cache_of
from luthier.data.shared_prefixes import concatenate_sharing_prefixes
from luthier.model.attention import isolate_samples, isolates_samples, shares_prefixes
from luthier.model.dropout import has_dropout
from luthier.model.frozen_models import FrozenModel, InitialPolicy, SeparateModel
from luthier.model.heads.output_head import inspect_head
from luthier.model.loading.frozen import load_frozen_model
from luthier.stages import FrozenModelSpec, Stage, cached_reference
from luthier.training.parts import collator, layout_of
from luthier.training.reference_logps import ReferenceScorer
from luthier.workflow.seeing import pixels_for, require_same_eyes, shared_by_rows, trial_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainingArguments

    from luthier.data.pixels import Pixels
    from luthier.model.attention import Trial
    from luthier.model.heads.output_head import OutputHead
    from luthier.workflow.text import TextSide


def load_separate_models(run: TrainRun, stage: Stage, text: "TextSide") -> "dict[str, nn.Module]":
    """Name -> model, for every frozen model that the loss runs at each step, except the initial policy."""
    return {
        spec.name: load_spec(run, spec, text)
        for spec in stage.frozen_models(run)
        if spec.source is not None and not spec.is_cached
    }


def load_spec(run: TrainRun, spec: FrozenModelSpec, text: "TextSide") -> "nn.Module":

    assert spec.source is not None, "the policy itself is not loaded again"
    return load_frozen_model(run, spec.key, spec.source, spec.adapters, text.fitted, bits=spec.bits)


def isolate_all(models: "Mapping[str, nn.Module]", trial: "Trial | None") -> str | None:
    """Why rows must be padded; None if no model attends across the samples of a row. `trial`: see
    `isolates_samples`."""

    for name, model in models.items():
        reason = isolates_samples(model, trial)
        if reason is not None:
            return f"{name} model: {reason}"
        isolate_samples(model)
    return None


def layout_by_keys(run: TrainRun, stage: Stage) -> Layout:
    """How the keys allow to concatenate rows: with tokens that several sequences begin with once for all, or without.

    Not where that would change numbers: noise and dropout are drawn per token, and routers count or choose tokens.
    Where the log-probabilities of a reference are computed before training, only the parts of a row share: its numbers
    must not depend on the rows beside it, not even in their last bits, so that the first ratios are exactly 1.
    """
    features = run.features
    counts = features.router_balance.moe_aux_loss_coef is not None
    chooses = features.mixture_of_depths.mixture_of_depths is not None
    draws = run.training["neftune_noise_alpha"] or (stage.has_dropout and getattr(run.adapter, "lora_dropout", 0))
    if not run.model.fast_path or run.parallel.sp_size > 1 or counts or chooses or draws:
        return concatenate_rows
    if cached_reference(stage, run) is None:
        return concatenate_sharing_prefixes
    num_parts = len(stage.rows.parts)
    return concatenate_rows if num_parts == 1 else partial(concatenate_sharing_prefixes, num_parts=num_parts)


def layout_for(run: TrainRun, stage: Stage, models: "Iterable[nn.Module]", *, sees: bool) -> Layout:
    """How rows are concatenated that these models read, none of which attends across samples. `sees`: rows may have
    images, whose tokens are not shared."""
    layout = concatenate_rows if sees else layout_by_keys(run, stage)
    if layout is concatenate_rows or all(shares_prefixes(model) and not has_dropout(model) for model in models):
        return layout
    return concatenate_rows


def frozen_models(
    run: TrainRun,
    stage: Stage,
    policy: "nn.Module",
    head: "OutputHead",
    separate: "Mapping[str, nn.Module]",
    device: "torch.device",
) -> "dict[str, FrozenModel]":
    """The frozen models that the loss runs at each step. `separate`: from `load_separate_models`; others are the
    initial policy."""

    found: dict[str, FrozenModel] = {}
    for spec in stage.frozen_models(run):
        if spec.name in separate:
            model = separate[spec.name].to(device)
            found[spec.name] = SeparateModel(model, inspect_head(model))
        elif not spec.is_cached:
            found[spec.name] = InitialPolicy.of(policy, head)
    return found


def reference_scorer(
    run: TrainRun,
    stage: Stage,
    text: "TextSide",
    policy: "nn.Module",
    args: "TrainingArguments",
    concatenated: Layout | None,
    pixels: "Pixels | None",
) -> ReferenceScorer | None:
    """What scores every row before training; None if the stage has no such reference in this run.

    `concatenated`: how the rows of `policy` are; None if they are padded. `pixels`: of the batches of `policy`.
    """
    spec = cached_reference(stage, run)
    if spec is None:
        return None
    model, pad = policy, text.tokenizer.pad_token_id
    seen = None if pixels is None else replace(pixels, stands_in=False)
    if spec.source is not None:
        model = load_spec(run, spec, text)
        require_same_eyes(spec.key, model, policy, text)
        is_padded = isolate_all({spec.name: model}, trial_of(text)) is not None
        concatenated = None if is_padded else layout_for(run, stage, [model], sees=text.media is not None)
        seen = pixels_for(model, text)
        if seen is not None:
            seen = shared_by_rows(run, stage, {spec.key: model}, seen, layout_of(pad, concatenated), args)
    has_shared, has_stored = seen is not None and seen.shares, seen is not None and seen.stored is not None
    layout = (concatenated is not None, concatenated not in (None, concatenate_rows), has_shared, has_stored)
    return ReferenceScorer(model, collator(pad, concatenated, seen), layout, args, cache_of(run.data))
