"""Training from the start or from a checkpoint, for any stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RunFailed
from luthier.core.log import info, warn
from luthier.model.failed_device import require_working_device
from luthier.model.loading.memory_check import is_out_of_memory
from luthier.training.callbacks.interrupt import GaveUp
from luthier.training.checkpoints.foreign import is_foreign, not_taken_over, require_same_adapter
from luthier.training.checkpoints.store import STATES, missing_states

if TYPE_CHECKING:
    from luthier.training.trainer import StageTrainer


@dataclass(frozen=True, slots=True)
class RunResult:
    """Result of a training run, printed by the command and saved in the output folder."""

    output_dir: Path
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`train`, `eval`, `predict` -> metric -> value."""
    log_history: Sequence[Mapping[str, Any]] = ()
    """The logged steps, as in trainer_state.json."""
    was_interrupted: bool = False
    compared: Mapping[str, Any] = field(default_factory=dict)
    """Peak memory and time, planned and actual."""


def fit(trainer: "StageTrainer", resume_from: Path | None) -> tuple[dict[str, float], bool]:
    """Train to the end. Returns the training metrics, and whether a signal stopped it (after saving a checkpoint).

    The metrics are empty if `resume_from` is already the last step. Raises `RunFailed` when out of memory, when the
    device has failed, and when a signal stopped it whose checkpoint could not be saved. Within the context of
    `trainer.stop`.
    """
    if resume_from is not None:
        trainer.args.eval_on_start = False  # the first step has been taken, and early stopping counts evaluations
        info(f"resuming from {resume_from}")
        missing = missing_states(resume_from)
        if len(missing) == len(STATES):
            warn(f"{resume_from} holds weights only (save_only_model), so optimizer and learning rate schedule restart")
        elif missing:
            warn(f"{resume_from} holds no state of these, so they restart: {', '.join(missing)}")
    if resume_from is not None and is_foreign(resume_from):
        require_same_adapter(resume_from, trainer.policy)
        for difference in not_taken_over(resume_from, trainer.policy, trainer.args):
            warn(f"{resume_from}: {difference}")
    stop = trainer.stop
    try:
        output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except GaveUp:
        trainer.save_last_step()
        if trainer.not_saved is not None:
            raise trainer.not_saved from None
        return {}, True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            require_working_device(error)
            raise
        raise RunFailed(
            f"out of memory at step {trainer.state.global_step}: {error} -> {trainer.memory_remedy()}"
        ) from error
    if stop.was_interrupted and trainer.not_saved is not None:
        raise trainer.not_saved
    if not trainer.num_trained_tokens:
        info(f"nothing left to train: {resume_from} is the last step of this run")
        return {}, stop.was_interrupted
    metrics = dict(output.metrics) | {"train_tokens_per_second": round(trainer.throughput(), 2)}
    if trainer.parts.has_images:
        seconds, num_workers = metrics["train_runtime"], trainer.args.dataloader_num_workers
        info(trainer.waiting.remark(seconds, num_workers))
        metrics["train_image_wait_seconds"] = round(trainer.waiting.seconds, 2)
        metrics["train_workers_needed"] = trainer.waiting.workers_needed(seconds, num_workers)
    return metrics | {"epoch": trainer.state.epoch}, stop.was_interrupted
