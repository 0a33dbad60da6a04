"""A training run from its keys to its output folder, the same for every stage."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.rules.bridge import under_megatron
from luthier.config.runs import TrainRun
from luthier.core.errors import InvalidInput
from luthier.core.importing import without_collection
from luthier.core.kinds import ADAPTERS, STAGES
from luthier.core.log import info, warn
from luthier.data.cache.fingerprint import is_dated
from luthier.model.features.liger import restoring_layers
from luthier.model.loading.memory_check import enough_memory
from luthier.model.processor import AS_IT_IS, fit_processor
from luthier.workflow.bridge import train_with_megatron
from luthier.workflow.preflight import tell_warnings
from luthier.workflow.rerun import Rerun
from luthier.workflow.text import TextSide, load_text_side

if TYPE_CHECKING:
    from torch import nn

    from luthier.core.machine import Machine
    from luthier.data.ledger import Ledger
    from luthier.data.prepare import PreparedData
    from luthier.stages import Stage
    from luthier.training.fit import RunResult
    from luthier.training.heartbeat import Heartbeat
    from luthier.training.trained_on import TrainedOn
    from luthier.training.trainer import StageTrainer
    from luthier.workflow.plan.foresight import Foresight


@dataclass(frozen=True, slots=True)
class Policy:
    """The model to train or to evaluate."""

    model: "nn.Module"
    padding_reason: str | None
    """Why rows must be padded; None if the model does not attend across the samples of a row."""
    unavailable: Mapping[str, str]
    """Key -> why the requested setting is unavailable."""


@enough_memory("take a smaller model, quantization_bit: 4, or smaller batches")
def train(run: TrainRun) -> "RunResult":
    """Run training, evaluation and prediction of a run file. Bad data fails before weights are loaded.

    machine -> tokenizer and chat format -> data -> policy -> parts -> trainer -> train, evaluate, predict -> report
    """
    tell_warnings(run)
    output_dir = Path(run.training["output_dir"])
    with without_collection():
        from luthier.core.machine import detect
        from luthier.training.checkpoints import tidy
        from luthier.training.determinism import restoring_kernels
        from luthier.training.heartbeat import Heartbeat
    if under_megatron(run):
        with restoring_kernels():
            return train_with_megatron(run, detect())
    resume_from, machine = starting_point(run, output_dir), detect()
    heartbeat = Heartbeat(output_dir, machine.device)
    with heartbeat.beating(), restoring_kernels(), restoring_layers():
        result = _train(run, resume_from, machine, heartbeat)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tidy(output_dir)
    return result


def _train(run: TrainRun, resume_from: Path | None, machine: "Machine", heartbeat: "Heartbeat") -> "RunResult":
    with without_collection():
        from accelerate.utils import gather_object

        from luthier.data.prepare import prepare
        from luthier.training.arguments import require_batch, training_arguments
        from luthier.training.checkpoints import checkpoints_in, step_of
        from luthier.training.engines import loading_whole, require_one_start
        from luthier.training.fp8 import settings_of
        from luthier.training.report import describes_step
        from luthier.training.trained_on import compare_rows
        from luthier.training.trainer import StageTrainer
        from luthier.workflow.eval_tasks import task_metrics
        from luthier.workflow.parts import make_parts
        from luthier.workflow.plan.foresight import foresee

    stage, output_dir = STAGES.get(run.stage), Path(run.training["output_dir"])
    from_scratch = resume_from is None and run.training["overwrite_output_dir"]
    rerun = Rerun(run, machine)
    args = training_arguments(run, machine)
    require_one_start(resume_from, gather_object([str(resume_from)]))
    text = load_text_side(run, reads_chat=stage.rows.reads_chat)
    data = prepare(run, stage.rows, text.encoding)
    rows = compare_rows(run, data, resume_from, is_dated=is_dated(text.encoding))
    rerun.compare(rows.now.get("rows"))
    if resume_from is not None and not describes_step(output_dir, step_of(resume_from)):
        rows.require_same()  # of a finished run, the trainer finds out whether it is to go on
    report_data(run, data, text)
    if run.trains and data.streamed is None and stage.rollout(run.method) is None:
        require_batch(run, machine.world_size, len(data.table or ()))
    tasks = task_metrics(run, text, data)
    processor = fit_processor(run, text.source) if run.trains else AS_IT_IS
    with loading_whole():
        foresight = foresee(run, stage, text, data, machine)
        policy = load_policy(run, stage, text, machine, output_dir, foresight.recompute.num_layers)
        parts = make_parts(
            run,
            stage,
            policy.model,
            data,
            text,
            args,
            padding_reason=policy.padding_reason,
            superseded=checkpoints_in(output_dir) if from_scratch else (),
            processor=processor,
            task_metrics=tasks,
        )
    with settings_of(run.fp8):
        trainer = StageTrainer(args, parts)
    trainer.add_callback(heartbeat)
    return carry_out(run, trainer, data, text, resume_from, rows, policy.unavailable, foresight, rerun)


def starting_point(run: TrainRun, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, if any. Creates `output_dir`; raises before anything expensive starts."""
    from luthier.core.files import require_apart, require_writable
    from luthier.training.checkpoints import checkpoints_in, resume_point, tidy

    requested, overwrite = run.training["resume_from_checkpoint"], run.training["overwrite_output_dir"]
    tidy(output_dir)
    resume_from = resume_point(output_dir, requested, overwrite) if run.trains else None
    for key in ("fsdp", "deepspeed"):
        if run.training[key] and "LOCAL_RANK" not in os.environ:
            raise InvalidInput(
                f"{key}: needs the processes of torchrun, and this is a single process"
                f" -> set the environment variable FORCE_TORCHRUN=1, or leave {key} out"
            )
    if run.trains and resume_from is None:
        for folder in (output_dir, *checkpoints_in(output_dir)):
            require_apart("output_dir", folder, (run.model.model_name_or_path, *run.model.adapter_name_or_path))
    require_writable("output_dir", output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return resume_from


def load_policy(
    run: TrainRun,
    stage: "Stage",
    text: TextSide,
    machine: "Machine",
    output_dir: Path,
    recomputed_layers: int | None = None,
) -> Policy:
    """Load the model. Raises `OutputError` if its weights will not fit on the disk of `output_dir`.

    `recomputed_layers`: see `luthier.model.backends.Backend`.
    """
    from luthier.core.files import require_space
    from luthier.model.attention import isolate_samples, isolates_samples
    from luthier.model.backends import load_for_inference, load_for_training
    from luthier.model.dropout import switch_dropout_off
    from luthier.model.embeddings import add_missing_rows
    from luthier.model.save import num_saved_bytes
    from luthier.workflow.seeing import trial_of

    unavailable: dict[str, str] = {}
    scores = stage.head == "score"
    if run.trains:
        loaded = load_for_training(
            run,
            text.fitted,
            machine,
            source=text.source,
            scores=scores,
            recomputed_layers=recomputed_layers,
            trial=trial_of(text),
        )
        if loaded.attention.reason:
            unavailable["flash_attn"] = loaded.attention.reason
        model, padding_reason = loaded.model, loaded.padding_reason
        require_space("output_dir", output_dir, num_saved_bytes(model))
    else:
        model = load_for_inference(run, machine, source=text.source, scores=scores)
        add_missing_rows(model, text.tokenizer, text.source)
        padding_reason = isolates_samples(model, trial_of(text))
    if padding_reason is None:
        isolate_samples(model)
    if not stage.has_dropout:
        switch_dropout_off(model)
    return Policy(model, padding_reason, unavailable)


def report_data(run: TrainRun, data: "PreparedData", text: TextSide) -> None:
    """Log the ledger and the first row, before the weights are loaded."""
    from luthier.inspection.terminal import sequences_of, without_colors

    for line in data.ledger.summary():
        info(line)
    rows: Any = data.train
    firsts = [] if rows is None or not run.trains else [rows[0]] if data.streamed is None else data.streamed.first(1)[0]
    for first in firsts:
        for title, sequence in sequences_of(first)[:2]:
            what = f"first row, {title}" if title else "first row"
            info(f"{what} (labeled tokens between ⟦ and ⟧): {without_colors(sequence, text.tokenizer)}")


def carry_out(
    run: TrainRun,
    trainer: "StageTrainer",
    data: "PreparedData",
    text: TextSide,
    resume_from: Path | None,
    rows: "TrainedOn",
    unavailable: Mapping[str, str],
    foresight: "Foresight",
    rerun: Rerun,
) -> "RunResult":
    """Train, evaluate and predict, as requested; each writes to `output_dir`. `unavailable`: from `load_policy`."""
    from accelerate.utils import gather_object

    from luthier.data.ledger import EVAL_LEDGER_FILE
    from luthier.training.fit import RunResult
    from luthier.training.hub import upload
    from luthier.workflow.predict import predict, predict_rows

    output_dir = Path(run.training["output_dir"])
    metrics: dict[str, Mapping[str, float]] = {}
    was_finished = ends_early = False
    if not run.trains:
        # Else `epoch` would be 0 in the metrics, and replace that of a training here.
        trainer.state.epoch = None  # type: ignore[assignment]
        write_data_report(trainer, data.ledger, output_dir / EVAL_LEDGER_FILE)
    else:
        with trainer.stop:
            training, was_interrupted, was_finished = fit_and_report_data(trainer, data, output_dir, resume_from, rows)
            if not was_interrupted and not was_finished:
                save_result(run, trainer, forgets=bool(training))
        if training:
            metrics["train"] = with_speed_per_device(run, trainer, training)
        if was_interrupted:
            info(resume_hint(run, output_dir, trainer.state.global_step))
            return RunResult(output_dir, metrics, trainer.state.log_history, was_interrupted=True)
        ends_early = any(gather_object([trainer.stop.has_signal]))
    if run.training["do_eval"] and data.eval and not ends_early:
        metrics["eval"] = trainer.evaluate()
    if run.training["do_predict"] and not ends_early:
        if trainer.stage.reporting.predict is not None:
            metrics["predict"] = predict_rows(trainer, data, output_dir)
        else:
            metrics["predict"] = predict(run, trainer, data, text)
    compared = foresight.compared(metrics.get("train", {}).get("train_runtime"))
    if trainer.args.world_size > 1:
        compared["peak_bytes_of_processes"] = gather_object([compared.get("peak_bytes")])
    if trainer.is_world_process_zero():
        is_new = run.trains and not was_finished
        facts = facts_of(run, trainer, data, rows, unavailable) | {"plan": compared} | rerun.facts() if is_new else None
        describe(run, trainer, metrics, facts, was_finished=was_finished)
        if is_new:
            rerun.compare_weights(output_dir)
    if ends_early:
        info(f"stopped: training had ended, and its weights are saved in {output_dir}")
    elif run.trains:
        upload(trainer)
    return RunResult(output_dir, metrics, trainer.state.log_history, ends_early, compared)


def with_speed_per_device(run: TrainRun, trainer: "StageTrainer", metrics: Mapping[str, float]) -> Mapping[str, float]:
    if not run.finetuning.include_effective_tokens_per_second:
        return metrics
    per_device = metrics["train_tokens_per_second"] / trainer.args.world_size
    return {**metrics, "effective_tokens_per_sec": round(per_device, 2)}


def save_result(run: TrainRun, trainer: "StageTrainer", *, forgets: bool) -> None:
    """Save the trained weights. `forgets`: the metrics of an earlier run belong to other weights, and go."""
    from luthier.training.report import forget_results

    output_dir = Path(run.training["output_dir"])
    trainer.save_final()
    if trainer.is_world_process_zero():
        ADAPTERS.get(run.finetuning_type).finish(run.adapter, output_dir)
    if forgets and trainer.is_world_process_zero():
        forget_results(output_dir)


def describe(
    run: TrainRun,
    trainer: "StageTrainer",
    metrics: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any] | None,
    *,
    was_finished: bool,
) -> None:
    """`facts`: for the manifest, None if nothing was trained. `was_finished`: an earlier run trained these weights."""
    from luthier.core.manifest import renew_manifest
    from luthier.training.report import describing, finish_training, record_evaluation, save_metrics

    output_dir = Path(run.training["output_dir"])
    with describing(output_dir):
        for split, values in metrics.items():
            save_metrics(output_dir, split, values)
        if was_finished:
            renew_manifest(output_dir)
        elif facts is not None:
            finish_training(run, trainer, metrics, run.model.model_name_or_path, facts)
        else:
            record_evaluation(output_dir)


def write_data_report(trainer: "StageTrainer", ledger: "Ledger", path: Path) -> None:
    from luthier.training.report import write_json

    if trainer.is_world_process_zero():
        write_json(path, ledger.to_json())


def fit_and_report_data(
    trainer: "StageTrainer", data: "PreparedData", output_dir: Path, resume_from: Path | None, rows: "TrainedOn"
) -> tuple[dict[str, float], bool, bool]:
    """Returns the training metrics, whether a signal stopped it, and whether a run here had finished before.

    Of a finished run nothing is trained, so the weights and all that describes them stay. Raises `OutputError` if the
    checkpoint was trained on other rows; all that describes the weights stays then, too.
    """
    from accelerate.utils import gather_object

    from luthier.core.files import write_atomically
    from luthier.data.ledger import LEDGER_FILE
    from luthier.training.fit import fit
    from luthier.training.report import describes_step, nothing_trained
    from luthier.training.trained_on import NoteRows

    report = output_dir / LEDGER_FILE
    earlier = report.read_text(encoding="utf-8") if report.is_file() else None
    if not rows.differences:  # else it is known only later whether anything is learned from these rows
        write_data_report(trainer, data.ledger, report)
    trainer.add_callback(NoteRows(rows))
    training, was_interrupted = fit(trainer, resume_from)
    # The first process decides for all, since they save together and may not share a disk.
    (was_finished, *_) = gather_object([describes_step(output_dir, trainer.state.global_step)])
    was_finished = was_finished and not training and not was_interrupted
    if was_finished:
        if trainer.is_world_process_zero():
            warn(nothing_trained(output_dir, resume_from, data.fingerprint))
            if earlier is not None:
                write_atomically(report, earlier)
    elif rows.differences and not training and not was_interrupted:
        raise rows.refusal()
    elif trainer.parts.reading is not None:
        report_stream(trainer, output_dir)
    elif rows.differences:
        write_data_report(trainer, data.ledger, report)
    return training, was_interrupted, was_finished


def facts_of(
    run: TrainRun, trainer: "StageTrainer", data: "PreparedData", rows: "TrainedOn", unavailable: Mapping[str, str]
) -> dict[str, Any]:
    """For the manifest: seed, data, model and settings that the weights were trained with."""
    from luthier.model.loading.loaded import resolved_settings
    from luthier.model.modules import unwrap
    from luthier.training.trained_on import KEY

    facts: dict[str, Any] = {
        "seed": run.training["seed"],
        "data": data.fingerprint,
        "model": run.model.model_name_or_path,
        "computed_with": resolved_settings(unwrap(trainer.policy)),
    }
    if rows.differences:
        facts["trained_on"] = trainer.state.stateful_callbacks[KEY]  # type: ignore[index, call-overload]
    return {**facts, "not_as_asked": dict(unavailable)} if unavailable else facts


def report_stream(trainer: "StageTrainer", output_dir: Path) -> None:
    """Save and log the ledger of a stream, which is known only at the end."""
    from luthier.data.ledger import LEDGER_FILE

    assert trainer.parts.reading is not None, "the rows are streamed"
    ledger = trainer.parts.reading.ledger()
    write_data_report(trainer, ledger, output_dir / LEDGER_FILE)
    for line in ledger.summary():
        info(line)


def resume_hint(run: TrainRun, output_dir: Path, step: int) -> str:
    """How to resume a run that was stopped after `step`."""
    from luthier.training.checkpoints import newest_whole

    checkpoint = newest_whole(output_dir, until_step=step)
    if checkpoint is None:
        return "stopped: no step has ended, so nothing is saved -> run the same command to start again"
    if run.training["overwrite_output_dir"] or run.training["resume_from_checkpoint"] not in (None, True, "true"):
        how = f"set resume_from_checkpoint: {checkpoint} to resume"
    else:
        how = "run the same command to resume"
    return f"stopped: {checkpoint} is saved -> {how}"
