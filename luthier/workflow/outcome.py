"""What a run does with its trainer: train, evaluate, predict, and write to its output folder what came out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.runs import TrainRun
from luthier.core.kinds import ADAPTERS
from luthier.core.log import info, warn
from luthier.workflow.rerun import Rerun
from luthier.workflow.text import TextSide

if TYPE_CHECKING:
    from luthier.data.ledger import Ledger
    from luthier.data.prepare import PreparedData
    from luthier.training.checkpoints.trained_on import TrainedOn
    from luthier.training.fit import RunResult
    from luthier.training.trainer import StageTrainer
    from luthier.workflow.plan.foresight import Foresight


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
                save_result(run, trainer, is_trained=bool(training))
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


def save_result(run: TrainRun, trainer: "StageTrainer", *, is_trained: bool) -> None:
    """Save the trained weights. Metrics there that belong to other weights go: of a run that this one has continued
    (`is_trained`), or whose continuation was killed before it could save the weights."""
    from luthier.core.manifest import MANIFEST_NAME
    from luthier.training.report import RESULTS_OF_TRAINING, described_step

    output_dir = Path(run.training["output_dir"])
    is_of_others = is_trained or described_step(output_dir) not in (None, trainer.state.global_step)
    trainer.save_final(outdates=(MANIFEST_NAME, *(RESULTS_OF_TRAINING if is_of_others else ())))
    if trainer.is_world_process_zero():
        ADAPTERS.get(run.finetuning_type).finish(run.adapter, output_dir)


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
    from luthier.training.checkpoints.trained_on import NoteRows
    from luthier.training.fit import fit
    from luthier.training.report import describes_step, nothing_trained

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
    from luthier.training.checkpoints.trained_on import KEY

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
    from luthier.training.checkpoints.store import newest_whole

    checkpoint = newest_whole(output_dir, until_step=step)
    if checkpoint is None:
        return "stopped: no step has ended, so nothing is saved -> run the same command to start again"
    if run.training["overwrite_output_dir"] or run.training["resume_from_checkpoint"] not in (None, True, "true"):
        how = f"set resume_from_checkpoint: {checkpoint} to resume"
    else:
        how = "run the same command to resume"
    return f"stopped: {checkpoint} is saved -> {how}"
