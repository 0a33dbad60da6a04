"""Training, evaluation and prediction of one run, whatever its stage."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from luthier.core.errors import RunFailed
from luthier.core.log import info, warn
from luthier.data.collate import collate, concatenate_rows, pad_rows
from luthier.data.prepare import PreparedData
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.heads.output_head import inspect_head
from luthier.model.loading.memory_check import is_out_of_memory
from luthier.model.processor import FittedProcessor
from luthier.stages import Stage
from luthier.training.arguments import is_in_16_bits, trackers
from luthier.training.callbacks.interrupt import StopOnSignal
from luthier.training.callbacks.module_profiler import ModuleProfiler
from luthier.training.callbacks.neftune import NeftuneNoise
from luthier.training.callbacks.progress import ProgressBar
from luthier.training.callbacks.swanlab import swanlab_callbacks
from luthier.training.callbacks.torch_profiler import TorchProfiler
from luthier.training.callbacks.trainer_log import TrainerLog
from luthier.training.fp8 import settings_of
from luthier.training.gauges import Utilization, gauges_of
from luthier.training.optimizers import chosen
from luthier.training.trainer import EvalMetrics, StageTrainer

if TYPE_CHECKING:
    import datasets
    from torch import nn
    from transformers import PreTrainedTokenizerBase, Seq2SeqTrainingArguments

    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a training run did; the command prints it and the output folder keeps it."""

    output_dir: Path
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`train`, `eval`, `predict` -> metric -> value."""
    log_history: Sequence[Mapping[str, Any]] = ()
    """What was logged, step by step, as in trainer_state.json."""
    was_interrupted: bool = False


def build_trainer(
    run: "TrainRun",
    stage: Stage,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    data: PreparedData,
    args: "Seq2SeqTrainingArguments",
    *,
    concatenates: bool,
    eval_metrics: EvalMetrics | None,
    superseded: Sequence[Path] = (),
    processor: FittedProcessor | None = None,
) -> StageTrainer:
    """`concatenates`: the attention of the model keeps rows apart that lie behind one another, so nothing is padded.

    `superseded`: checkpoints of an earlier run, which go when this one has saved something.

    `processor`: what is saved with the weights, see `copy_processor`.
    """
    log = TrainerLog(
        Path(run.training["output_dir"], "trainer_log.jsonl"), starts_anew=run.training["overwrite_output_dir"]
    )
    callbacks: list[TrainerCallback] = [log, ProgressBar(), *trackers_of(run)]
    if run.finetuning.early_stopping_steps is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run.finetuning.early_stopping_steps))
    callbacks += measuring(run)
    gauges = gauges_of(args.device.type, is_16_bit=is_in_16_bits(run))
    callbacks += [gauge for gauge in gauges if isinstance(gauge, Utilization)]
    if run.training["neftune_noise_alpha"]:
        callbacks.append(NeftuneNoise(run.training["neftune_noise_alpha"]))
    num_together = args.world_size * args.eval_batch_size
    evals = {name: filled_up(rows, num_together) if args.world_size > 1 else rows for name, rows in data.eval.items()}
    eval_sets: Any = evals[""] if set(evals) == {""} else evals or None
    with settings_of(run.fp8):
        return StageTrainer(
            stage=stage,
            config=run.method,
            model=model,
            head=inspect_head(model, run.model.moe_aux_loss_coef),
            args=args,
            collate=collator(tokenizer.pad_token_id, concatenates),
            train_dataset=data.train,
            eval_dataset=eval_sets,
            tokenizer=tokenizer,
            callbacks=callbacks,
            shuffle=not run.finetuning.disable_shuffling,
            eval_metrics=eval_metrics,
            build_optimizer=chosen(run),
            gauges=gauges,
            superseded=superseded,
            ledger=data.ledger,
            processor=processor,
        )


def trackers_of(run: "TrainRun") -> "list[TrainerCallback]":
    """Those of `report_to`, and SwanLab with its keys in the place of the plain one."""
    asked = run.training["report_to"]
    if not run.swanlab.use_swanlab:
        return trackers(asked)
    others = [name for name in ([asked] if isinstance(asked, str) else asked or ()) if name != "swanlab"]
    return [*trackers(others), *swanlab_callbacks(run.swanlab, run.training["run_name"])]


def measuring(run: "TrainRun") -> "list[TrainerCallback]":
    """The profilers that the run asks for."""
    found: list[TrainerCallback] = []
    if run.profiler.enable_torch_profiler:
        folder = run.profiler.profiler_output_dir or Path(run.training["output_dir"], "profiler")
        found.append(TorchProfiler(run.profiler, Path(folder)))
    if run.finetuning.profile_modules:
        found.append(ModuleProfiler(run.finetuning.profile_modules))
    return found


def filled_up(rows: "datasets.Dataset", multiple: int) -> "datasets.Dataset":
    """As many rows as all processes take at a time, by rows in which nothing is learned, so that none counts twice."""
    import datasets

    num_missing = -len(rows) % multiple
    if not num_missing:
        return rows
    labels = {name: [IGNORE_INDEX] * len(rows[0][name]) for name in rows.column_names if name.endswith("labels")}
    filler = {**rows[0], **labels}
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_list([filler] * num_missing, rows.features)])


def collator(pad_token_id: int, concatenates: bool) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    layout = concatenate_rows if concatenates else partial(pad_rows, pad_token_id=pad_token_id)
    return partial(collate, layout=layout)


def fit(trainer: StageTrainer, resume_from: Path | None) -> tuple[dict[str, float], bool]:
    """Train to the end. Returns the metrics of training, and whether a signal ended it early (its checkpoint is saved).

    There are no metrics if `resume_from` is the end of the run already. Raises `RunFailed` if memory runs out.
    """
    if resume_from is not None:
        info(f"going on from {resume_from}")
        if not any(resume_from.glob("rng_state*")):
            warn(f"{resume_from} holds weights only (save_only_model), so optimizer and learning rate start anew")
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        try:
            output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailed(
                f"there was not enough memory at step {trainer.state.global_step}: {error}"
                " -> lower per_device_train_batch_size or cutoff_len and raise gradient_accumulation_steps"
            ) from error
    if not trainer.num_trained_tokens:
        info(f"nothing is left to train: {resume_from} is the last step of this run")
        return {}, stop.was_interrupted
    metrics = dict(output.metrics) | {"train_tokens_per_second": round(trainer.throughput(), 2)}
    return metrics | {"epoch": trainer.state.epoch}, stop.was_interrupted


def with_perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """eval_loss -> eval_perplexity = exp(loss), for every evaluation set."""
    more = {
        name.removesuffix("loss") + "perplexity": math.exp(value)
        for name, value in metrics.items()
        if name.endswith("_loss")
    }
    return {**metrics, **more}
