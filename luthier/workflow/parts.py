"""The parts of a trainer, made from a run: datasets, head, frozen models and rollouts come first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput, ModelError
from luthier.core.log import info, warn
from luthier.data.collate import Layout, concatenate_rows
from luthier.data.pixels import Pixels
from luthier.data.prepare import cache_of
from luthier.data.stream import StreamedRows
from luthier.model.heads.value_head import add_value_head
from luthier.model.media.processor import AS_IT_IS, FittedProcessor
from luthier.model.sequence_parallel import spread_tokens
from luthier.model.types import Models
from luthier.training.arguments import is_in_16_bits
from luthier.training.callbacks import callbacks_of
from luthier.training.distributed.sequence_groups import SequenceGroups, sequence_groups
from luthier.training.media_features import NO_MEDIA, FeatureKeeper
from luthier.training.optimizers import chosen
from luthier.training.parts import TaskMetrics, TrainingParts, collator, layout_of, policy_head, with_fillers
from luthier.training.reference_logps import ReferenceScorer
from luthier.training.streaming import StreamReading
from luthier.training.watch.gauges import Utilization, gauges_of
from luthier.workflow.frozen_models import (
    frozen_models,
    isolate_all,
    layout_for,
    load_separate_models,
    reference_scorer,
)
from luthier.workflow.predict import generation_metrics
from luthier.workflow.rollouts import make_rollouts
from luthier.workflow.seeing import require_same_eyes, shared_by_rows, training_pixels, trial_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import Seq2SeqTrainingArguments

    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.stages import Stage
    from luthier.workflow.text import TextSide


def make_parts(
    run: "TrainRun",
    stage: "Stage",
    policy: "nn.Module",
    data: "PreparedData",
    text: "TextSide",
    args: "Seq2SeqTrainingArguments",
    *,
    padding_reason: str | None,
    superseded: Sequence[Path] = (),
    processor: FittedProcessor = AS_IT_IS,
    task_metrics: TaskMetrics | None = None,
) -> "TrainingParts":
    """Everything that the trainer needs.

    `padding_reason`: why rows must be padded; None if `policy` does not attend across the samples of a row.
    `superseded`: checkpoints and descriptions of an earlier run, removed once this one has saved something.
    `task_metrics`: of `eval_tasks`.
    """
    separate = _separate_models(run, stage, policy, text)
    padding_reason = padding_reason or isolate_all(separate, trial_of(text))
    if padding_reason is not None:
        report_padding(padding_reason, is_packed=data.is_packed, must_isolate=run.data.neat_packing)
    groups = _spread(run, policy, text, args, padding_reason)
    concatenated = None if padding_reason else _concatenated(run, stage, [policy, *separate.values()], text)
    pixels = _pixels(run, stage, policy, separate, data, text, args, concatenated)
    collate = collator(text.tokenizer.pad_token_id, concatenated, pixels, groups)
    head = policy_head(policy, args, run.features.router_balance.moe_aux_loss_coef)
    models = Models(policy, head, frozen_models(run, stage, policy, head, separate, args.device))
    scorer = reference_scorer(run, stage, text, policy, args, concatenated, pixels)
    train_rows, eval_rows = rows_of(data, args, scorer)
    del scorer  # a reference model of its own is not kept in memory
    plan = stage.rollout(run.method) if run.trains else None
    if plan is not None and plan.has_values:
        models = replace(models, head=replace(head, value=add_value_head(policy)))
    rollouts = None if plan is None else make_rollouts(run, plan, models, args, collate, data, text, pixels)
    gauges = gauges_of(args.device.type, is_16_bit=is_in_16_bits(run))
    return TrainingParts(
        stage=stage,
        config=run.method,
        models=models,
        tokenizer=text.tokenizer,
        collate=collate,
        has_images=pixels is not None,
        train_rows=train_rows,
        eval_rows=eval_rows,
        shuffle=run.shuffles,
        reading=StreamReading(train_rows, data.ledger, args) if isinstance(train_rows, StreamedRows) else None,
        rollouts=rollouts,
        build_optimizer=chosen(run),
        callbacks=[*callbacks_of(run, stage), *(gauge for gauge in gauges if isinstance(gauge, Utilization))],
        gauges=gauges,
        eval_metrics=generation_metrics(run, data, text) if run.training["predict_with_generate"] else None,
        task_metrics=task_metrics,
        superseded=superseded,
        recovery=run.recovery,
        groups=groups,
        processor=processor,
    )


def _pixels(
    run: "TrainRun",
    stage: "Stage",
    policy: "nn.Module",
    separate: "dict[str, Any]",
    data: "PreparedData",
    text: "TextSide",
    args: "Seq2SeqTrainingArguments",
    concatenated: Layout | None,
) -> Pixels | None:
    """What makes the inputs of the policy from media, or reads their features; None for a run without media.
    `separate`: models that get the same."""
    pixels = training_pixels(policy, text, args)
    if pixels is None or text.media is None:
        if run.finetuning.cache_media_features:
            warn(NO_MEDIA)
        return None
    layout = layout_of(text.tokenizer.pad_token_id, concatenated)
    pixels = shared_by_rows(run, stage, {"model": policy, **separate}, pixels, layout, args)
    if not run.finetuning.cache_media_features:
        return pixels
    keeper = FeatureKeeper(policy, pixels, text.media.digest, args, cache_of(run.data))
    return keeper.keep([rows for rows in (data.table, *data.eval.values()) if rows is not None], separate)


def _separate_models(run: "TrainRun", stage: "Stage", policy: "nn.Module", text: "TextSide") -> "dict[str, Any]":
    """The other models of the stage by their names. They must read the batches of the policy."""
    found = load_separate_models(run, stage, text)
    for name, model in found.items():
        require_same_eyes(f"{name} model", model, policy, text)
    return found


def _concatenated(run: "TrainRun", stage: "Stage", models: "Sequence[nn.Module]", text: "TextSide") -> Layout:
    """As `layout_for`, with a line in the log."""
    layout = layout_for(run, stage, models, sees=text.media is not None)
    if layout is not concatenate_rows:
        info("tokens that several texts of a batch begin with are computed once")
    return layout


def _spread(
    run: "TrainRun",
    policy: "nn.Module",
    text: "TextSide",
    args: "Seq2SeqTrainingArguments",
    padding_reason: str | None,
) -> SequenceGroups | None:
    """The processes that share the tokens of a batch (`sp_size`); the policy attends over all of their tokens."""
    groups = sequence_groups(run.parallel.sp_size, args.device)
    if groups is None:
        return None
    if text.media is not None:
        raise InvalidInput("sp_size: rows of text alone can be spread over processes -> leave sp_size out")
    spread_tokens(policy, groups.group, padding_reason)
    info(f"each batch is spread over {groups.size} processes, of which each computes a part of its tokens")
    return groups


def rows_of(
    data: "PreparedData", args: "Seq2SeqTrainingArguments", scorer: ReferenceScorer | None
) -> tuple[Any, Mapping[str, Any]]:
    """(training rows, evaluation rows by name), with reference log-probabilities if there is a `scorer`."""
    eval_rows: Mapping[str, Any] = data.eval
    if args.world_size > 1:
        global_batch = args.world_size * args.eval_batch_size
        eval_rows = {name: with_fillers(rows, global_batch) for name, rows in data.eval.items()}
    if scorer is None:
        return data.train, eval_rows
    train_rows = None if data.table is None else scorer.add_to({"train": data.table})["train"]
    return train_rows, scorer.add_to(eval_rows)


def report_padding(reason: str, *, is_packed: bool, must_isolate: bool) -> None:
    """Raises `ModelError` if packed samples must not attend to each other and the model cannot ensure that."""
    if is_packed and must_isolate:
        raise ModelError(
            f"neat_packing: this model attends across the samples of a row: {reason}"
            " -> leave neat_packing out, or set packing: true, which allows that"
        )
    info(f"rows are padded: {reason}")
    if is_packed:
        warn("packing: this model attends across the samples of a row")
