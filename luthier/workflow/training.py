"""A training run from its keys to its output folder, the same for every stage."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.rules.bridge import under_megatron
from luthier.config.runs import TrainRun
from luthier.core.claims import claiming
from luthier.core.errors import InvalidInput
from luthier.core.importing import without_collection
from luthier.core.kinds import STAGES
from luthier.core.log import info
from luthier.data.cache.fingerprint import is_dated
from luthier.model.compat.bitsandbytes_overrides import forgetting_overrides
from luthier.model.features.liger import restoring_layers
from luthier.model.loading.memory_check import enough_memory
from luthier.model.media.processor import AS_IT_IS, fit_processor
from luthier.workflow.megatron.bridge import train_with_megatron
from luthier.workflow.outcome import carry_out
from luthier.workflow.preflight import tell_warnings
from luthier.workflow.rerun import Rerun
from luthier.workflow.text import TextSide, load_text_side

if TYPE_CHECKING:
    from torch import nn

    from luthier.core.machine import Machine
    from luthier.data.prepare import PreparedData
    from luthier.stages import Stage
    from luthier.training.fit import RunResult
    from luthier.training.watch.heartbeat import Heartbeat


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
    with claimed(Path(run.training["output_dir"])):
        return _train_alone(run)


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Makes `output_dir` and keeps other runs out of it. Raises `OutputError` if one is there. The first process of a
    run does so for all."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with suppress(OSError):  # told by `starting_point`
        output_dir.mkdir(parents=True, exist_ok=True)
    with claiming("output_dir", output_dir):
        yield


def _train_alone(run: TrainRun) -> "RunResult":
    output_dir = Path(run.training["output_dir"])
    with without_collection():
        from luthier.core.machine import detect
        from luthier.training.checkpoints.store import tidy
        from luthier.training.determinism import restoring_kernels
        from luthier.training.watch.heartbeat import Heartbeat
    if under_megatron(run):
        with restoring_kernels():
            return train_with_megatron(run, detect())
    resume_from, machine = starting_point(run, output_dir), detect()
    heartbeat = Heartbeat(output_dir, machine.device)
    with heartbeat.beating(), restoring_kernels(), restoring_layers(), forgetting_overrides():
        result = _train(run, resume_from, machine, heartbeat)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tidy(output_dir)
    return result


def _train(run: TrainRun, resume_from: Path | None, machine: "Machine", heartbeat: "Heartbeat") -> "RunResult":
    with without_collection():
        from accelerate.utils import gather_object

        from luthier.data.prepare import prepare
        from luthier.training.arguments import require_batch, training_arguments
        from luthier.training.callbacks.upload import UploadCheckpoints
        from luthier.training.checkpoints.row_order import NoteOrder, order_of
        from luthier.training.checkpoints.store import checkpoints_in, step_of
        from luthier.training.checkpoints.trained_on import compare_rows
        from luthier.training.distributed.engines import loading_whole, require_one_start
        from luthier.training.fp8 import settings_of
        from luthier.training.report import describes_step, descriptions_in
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
            superseded=(*descriptions_in(output_dir), *checkpoints_in(output_dir)) if from_scratch else (),
            processor=processor,
            task_metrics=tasks,
        )
    with settings_of(run.fp8):
        trainer = StageTrainer(args, parts)
    trainer.add_callback(heartbeat)
    if run.trains and data.streamed is None:
        trainer.add_callback(NoteOrder(order_of(run, machine.world_size)))
    if trainer.hub_model_id is not None:
        trainer.add_callback(UploadCheckpoints(trainer.hub_model_id))
    return carry_out(run, trainer, data, text, resume_from, rows, policy.unavailable, foresight, rerun)


def starting_point(run: TrainRun, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, if any. Creates `output_dir`; raises before anything expensive starts."""
    from luthier.core.files import require_apart, require_writable
    from luthier.training.checkpoints.store import checkpoints_in, resume_point, tidy

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
