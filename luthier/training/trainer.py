"""The trainer of all stages: transformers' loop with the loss, the units and the batches of a `Stage` value.

Everything that differs between training methods is in that value; there is no subclass or `if` per stage.
One optimizer step, from top to bottom of `StageTrainer`:

    get_batch_samples         the micro-batches of the step: rows, or sampled answers
    _get_num_items_in_batch   their units over all processes, and the statistics of the step
    compute_loss              for each micro-batch: loss sum / units of the whole step; transformers runs backward
    create_optimizer          (once) the optimizer that transformers then steps
    log                       means of the metrics since the last log line
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, SchedulerType
from transformers.training_args import OptimizerNames

from luthier.core.drafts import draft_name, remove
from luthier.core.errors import RunFailed
from luthier.core.files import save_folder_atomically
from luthier.data.collate import tokens_in
from luthier.data.ledger import LEDGER_FILE
from luthier.model import save
from luthier.model.adapters._merge import unwrap
from luthier.model.adapters._pissa import is_pissa, resume_pissa
from luthier.model.adapters._series import check_resumed
from luthier.model.features.rope_scaling import BESIDE_ADAPTER, save_beside_adapter
from luthier.model.heads.score_head import save_value_head, without_value_head
from luthier.model.processor import PROCESSOR_FILES
from luthier.stages import StageState, StepStatistics, Sums
from luthier.training import checkpoints
from luthier.training.arguments import accepted
from luthier.training.checkpoints import TRAINER_STATE, check_filled, checkpoint_mismatch
from luthier.training.distributed import add_to, batch_by_batch, over_processes
from luthier.training.hub import creating_repository
from luthier.training.nonfinite import NonFiniteWatch
from luthier.training.parts import TrainingParts
from luthier.training.report import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Seq2SeqTrainingArguments

MODEL_FILES = (*save.WEIGHT_FILES, *PROCESSOR_FILES, "config.json", "generation_config.json")
"""The files of a model or an adapter besides its tokenizer; those of an earlier run are removed."""

STAGE_STATE_FILE = "stage_state.json"
"""In a checkpoint: the state of the stage (`luthier.stages.StageState`)."""


class StageTrainer(Trainer):
    """transformers.Trainer for any stage."""

    def __init__(self, args: "Seq2SeqTrainingArguments", parts: TrainingParts) -> None:
        evals = parts.eval_rows
        super().__init__(
            model=parts.models.policy,
            args=args,
            data_collator=parts.collate if parts.rollouts is None else parts.rollouts.numbers_or_batch,  # type: ignore[arg-type]
            train_dataset=parts.train_rows if parts.rollouts is None else parts.rollouts.step_rows,
            eval_dataset=evals[""] if set(evals) == {""} else dict(evals) or None,
            processing_class=parts.tokenizer,
            callbacks=list(parts.callbacks),
        )
        self.remove_callback(PrinterCallback)
        assert args.output_dir is not None, "the rules require output_dir"
        self.parts, self.stage, self.policy, self.output_dir = parts, parts.stage, parts.models.policy, args.output_dir
        # The loss is divided by the units of the whole optimizer step, so accumulation must not divide it again.
        self.loss_is_scaled_for_ga = True
        self.stage_state: StageState = {}
        self.num_trained_tokens = 0
        self.watch = NonFiniteWatch(parts.tokenizer, Path(args.output_dir))
        self.unsaved: dict[str, Exception] = {}
        self._superseded = list(parts.superseded)
        self._drafts = Path(args.output_dir, gather_object([draft_name("checkpoints")])[0])
        self._metrics: dict[str, tuple[Tensor, float]] = {}
        self._train_start_seconds = 0.0
        self._flops_per_token: int | None = None

    # -- one optimizer step -----------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step and their units; sampled answers if the stage has rollouts."""
        rollouts = self.parts.rollouts
        if rollouts is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        num_batches = len(list(islice(epoch_iterator, num_batches)))
        step = rollouts.step(self.state.global_step, num_batches, self.stage_state)
        self.stage_state = step.state
        add_to(self._metrics, step.metrics)
        return step.batches, self._get_num_items_in_batch(step.batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> "Tensor":
        """The units of one optimizer step over all its micro-batches and all processes."""
        self.watch.require_finite_losses(self.state.global_step)
        if self.parts.reading is not None:
            self.parts.reading.take(batch_samples)
        counts = [(self.stage.units(batch), tokens_in(batch)) for batch in batch_samples]
        sums = torch.tensor([[sum(units) for units in zip(*counts, strict=True)]], device=device)
        num_units, num_tokens = self.accelerator.gather(sums).sum(0)
        self.num_trained_tokens += int(num_tokens)
        statistics = self.stage.statistics
        if statistics is not None:
            self.stage_state = self._state_for(statistics, self.model_wrapped, batch_samples, self.stage_state)
        if not self._train_start_seconds:
            self._train_start_seconds = time.monotonic()
        return num_units

    def compute_loss(
        self, model: "nn.Module", inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        models = replace(self.parts.models, policy=model)
        output = self.stage.loss(models, inputs, self.parts.config, state=self.stage_state, training=True)
        self.watch.note(inputs, output.total)
        add_to(self._metrics, output.metrics)
        # Gradients are averaged over processes, but this loss is already divided by the units of all of them.
        return output.total / num_items_in_batch * self.accelerator.num_processes

    def create_optimizer(self, model: "nn.Module | None" = None) -> Any:
        with accepted("optim", str(OptimizerNames(self.args.optim).value)):
            if self.parts.build_optimizer is not None:
                self.optimizer = self.parts.build_optimizer(self.policy if model is None else model, self.args)
                return self.optimizer
            return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and not self.num_trained_tokens:
            return  # the run was already complete, so there is no mean loss
        if "loss" in logs:
            self.watch.require_finite_losses(self.state.global_step)
            if not math.isfinite(logs["loss"]):
                raise self.watch.failure(f"the loss became {logs['loss']}", self.state.global_step)
            totals = over_processes(self._metrics, self.args.device)
            means = {name: total / count for name, (total, count) in totals.items() if count}
            logs |= {**means, **self.stage.reporting.derived(means)}
            self._metrics = {}
            logs["throughput"] = round(self.throughput(), 2)
            for gauge in self.parts.gauges:
                logs |= gauge()
        super().log(logs, start_time)

    def _state_for(
        self, statistics: StepStatistics, model: Any, batches: Iterable[Any], state: StageState
    ) -> StageState:
        """`state` updated with these batches, over all processes."""
        models, config = replace(self.parts.models, policy=model), self.parts.config
        sums: dict[str, tuple[Tensor, float]] = {}
        for more in batch_by_batch(
            batches, self.args.device, lambda batch: statistics.sums(models, batch, config, state=state)
        ):
            add_to(sums, more)
        totals = over_processes(sums, self.args.device)
        means = {name: (total / count if count else 0.0, count) for name, (total, count) in totals.items()}
        return statistics.update(state, means, config)

    def floating_point_ops(self, inputs: Any) -> int:
        """As in transformers, which counts the parameters at each step: 12 ms for 30 layers with adapters."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            return 0
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops({name: torch.empty(1)})
        return self._flops_per_token * inputs[name].numel()

    def throughput(self) -> float:
        """Tokens per second since training began, without padding."""
        return self.num_trained_tokens / max(time.monotonic() - self._train_start_seconds, 1e-9)

    # -- hooks of transformers around the steps -----------------------------------------------------

    def get_train_dataloader(self) -> Any:
        if self.parts.reading is None:
            return super().get_train_dataloader()
        return self.parts.reading.loader(self._train_batch_size, self.parts.collate)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.parts.shuffle:
            return super()._get_train_sampler(train_dataset)
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(rows)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Stops at `max_steps`: transformers takes one more step when it resumes from the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and not self.args.lr_scheduler_kwargs:
            # transformers has no default; as in LLaMA-Factory, the first third after the warm-up is stable.
            num_left = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": num_left - num_left // 3}
        with accepted("lr_scheduler_type", str(SchedulerType(self.args.lr_scheduler_type).value)):
            return super().create_scheduler(num_training_steps, optimizer)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with creating_repository():
            super().init_hf_repo(token, private)

    # -- evaluation ------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics: sums over the whole set divided by their counts, so the batch size does not matter."""
        model = self._wrap_model(self.policy, training=False)
        if not self.accelerator._models and model is self.policy:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        # Reading batches consumes random numbers, which must not change the training that follows.
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            totals = over_processes(self._evaluation_sums(model, dataloader), device)
        means = {name: t / n if n else math.nan for name, (t, n) in totals.items() if n or name == "loss"}
        means |= self.stage.reporting.derived(means)
        if self.parts.eval_metrics is not None:
            means |= self.parts.eval_metrics(model, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        if self.parts.task_metrics is not None:
            metrics |= self.parts.task_metrics(model, metric_key_prefix)
        # Predictions are written by `luthier.workflow.predict`.
        return EvalLoopOutput(np.empty(0), None, metrics, self.num_examples(dataloader))

    def _evaluation_sums(self, model: "nn.Module", dataloader: Any) -> "dict[str, tuple[Tensor, float]]":
        """Loss and metrics of this process: name -> (sum, count)."""
        models, config = replace(self.parts.models, policy=model), self.parts.config
        state: StageState = {}
        if self.stage.statistics is not None:
            state = self._state_for(self.stage.statistics, model, dataloader, state)

        def compute(batch: dict[str, Any]) -> Sums:
            output = self.stage.loss(models, batch, config, state=state, training=False)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            return {"loss": (output.total, self.stage.units(batch)), **output.metrics}

        sums: dict[str, tuple[Tensor, float]] = {}
        for more in batch_by_batch(dataloader, self.args.device, compute):
            add_to(sums, more)
        return sums

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = self.args.metric_for_best_model
        if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            raise RunFailed(
                f"metric_for_best_model: {wanted}: is not an evaluation metric"
                f" -> use one of {', '.join(sorted(metrics))}"
            )
        return super()._determine_best_metric(metrics, trial)

    # -- saving and resuming ---------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: "nn.Module | None" = None) -> None:
        check_resumed(self.policy, Path(resume_from_checkpoint))
        with checkpoint_mismatch(resume_from_checkpoint):
            if is_pissa(self.policy):
                resume_pissa(self.policy, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.parts.reading is not None:
            self.parts.reading.restore(Path(resume_from_checkpoint))
        if self.parts.rollouts is not None:
            self.parts.rollouts.load(Path(resume_from_checkpoint))
        saved = Path(resume_from_checkpoint, STAGE_STATE_FILE)
        if saved.is_file():
            self.stage_state = json.loads(saved.read_text(encoding="utf-8"))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            checkpoints.require_whole_best(Path(best))
        if best is not None and is_pissa(self.policy):
            resume_pissa(self.policy, Path(best))
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_filled(self.policy, load_result.missing_keys, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoint_mismatch(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in transformers, but the weights come first, and stay if anything else cannot be saved (`unsaved`).

        peft does not query the hub for a changed vocabulary of the base model. It need not: a trainable embedding is
        among the adapter's `modules_to_save`.
        """
        folder, writes, base = Path(output_dir or self.output_dir), self.args.should_save, unwrap(self.policy)
        more = {TRAINING_ARGS_NAME: partial(torch.save, self.args, folder / TRAINING_ARGS_NAME)}
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            save_value_head(folder, self.policy, state_dict)
        if not isinstance(self.model, PeftModel):
            save.save_weights(base, folder, without_value_head(self.policy, state_dict), is_writer=writes)
        elif writes:
            save.save_adapter(self.model, folder, state_dict)
            more[BESIDE_ADAPTER] = partial(save_beside_adapter, folder, base.config)
        if writes:
            self.unsaved = save.save_beside_weights(
                self.policy, self.parts.tokenizer, folder, self.parts.processor, more
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes checkpoints and would remove old ones: a folder that holds nothing but a draft."""
        return str(self._drafts)

    def _save_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        """Write the checkpoint beside, rename it when it is whole, and remove old ones after that."""
        self.watch.require_finite_weights(self.policy, self.state.global_step)
        writes, folder = self.args.should_save, Path(self.output_dir, f"checkpoint-{self.state.global_step}")
        draft = self._drafts / folder.name
        with checkpoints.saving(folder):
            with checkpoints.writing(draft, folder, is_writer=writes):
                # Every process writes here: after the writer has made the folder, before it makes the manifest.
                self.accelerator.wait_for_everyone()
                draft.mkdir(parents=True, exist_ok=True)
                if self.stage_state and writes:
                    (draft / STAGE_STATE_FILE).write_text(json.dumps(dict(self.stage_state)))
                ledger = self.parts.reading.save(draft, writes=writes) if self.parts.reading is not None else None
                if self.parts.rollouts is not None:
                    self.parts.rollouts.save(draft, self.state.global_step)
                super()._save_checkpoint(model, trial)
                save.raise_disk_fault(self.unsaved)
                self._note_best(draft)
                self.accelerator.wait_for_everyone()
            if writes:
                if ledger is not None:
                    write_json(Path(self.output_dir, LEDGER_FILE), ledger.to_json())
                self._remove_superseded(folder)
                best = self.state.best_model_checkpoint
                checkpoints.rotate(folder, self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            remove(self._drafts)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))

    def _note_best(self, draft: Path) -> None:
        """Name the best checkpoint where it will be; transformers looked for it among the drafts."""
        best = Path(self.output_dir, f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best.name == draft.name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(draft / TRAINER_STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: transformers calls this for a draft. `_save_checkpoint` uploads what is whole."""

    def save_final(self) -> None:
        """Save the weights of the finished run to `output_dir`, replacing earlier ones.

        Raises `RunFailed` if they do not fit on the disk or are not finite; earlier weights are kept then.
        """
        self.watch.require_finite_weights(self.policy, self.state.global_step)
        output_dir, best = Path(self.output_dir), self.state.best_model_checkpoint
        with checkpoints.saving(output_dir):
            if self.args.should_save:
                with save_folder_atomically(output_dir, replaces=MODEL_FILES) as folder:
                    self.save_model(str(folder), _internal_call=True)
                self._remove_superseded(output_dir)
                if best is not None and self.args.save_total_limit == 1 and checkpoints.is_whole(Path(best)):
                    checkpoints.rotate(Path(best), 1, None)
            else:
                self.save_model(_internal_call=True)
        if self.unsaved:
            raise save.incomplete(output_dir, self.unsaved, str(unwrap(self.policy).name_or_path))

    def _remove_superseded(self, saved: Path) -> None:
        """`saved`: what this run has saved in their place."""
        for folder in self._superseded:
            if folder != saved:
                checkpoints.remove(folder)
        self._superseded = []
