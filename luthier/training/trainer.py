"""The trainer of all stages: transformers' loop with the loss, the units and the batches of a `Stage` value.

Everything that differs between training methods is in that value; there is no subclass or `if` per stage.
One optimizer step, from top to bottom of `StageTrainer`:

    get_batch_samples         the micro-batches of the step: rows, or sampled answers
    _get_num_items_in_batch   their units over all processes, and the statistics of the step
    training_step             for each micro-batch: forward and backward, in parts after memory has run out (`retrying`)
    compute_loss              loss sum / units of the whole step
    _get_grad_norm            whether all of it is finite, and what follows if it is not
    create_optimizer          (once) the optimizer that transformers then steps
    log                       means of the metrics since the last log line

Steps that run out of memory are in `luthier.training.retrying`, saving in `luthier.training.checkpointed`,
resuming in `luthier.training.resuming`.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, SchedulerType
from transformers.training_args import OptimizerNames

from luthier.config.keys.training import BY_LENGTH
from luthier.core.errors import RunFailed
from luthier.core.log import warn
from luthier.data.collate import require_whole
from luthier.model.compat.fsdp_cpu import fsdp_on_cpu
from luthier.model.compat.tensor_parallel_cpu import tensor_parallel_on_cpu
from luthier.stages import StageState, StepStatistics, Sums
from luthier.training.arguments import accepted, tell_long_warm_up
from luthier.training.averaged import averaged
from luthier.training.callbacks.interrupt import GaveUp
from luthier.training.distributed.sequence_groups import rows_by_group
from luthier.training.distributed.sums import add_to, batch_by_batch, over_processes
from luthier.training.hub import creating_repository
from luthier.training.loader_workers import serve
from luthier.training.parts import TrainingParts
from luthier.training.predictions import follow
from luthier.training.retrying import RetryingTrainer, size_of
from luthier.training.row_lengths import as_long_as
from luthier.training.sampling import begin_epoch, by_epoch
from luthier.training.unlogged import Unlogged
from luthier.training.watch.left_out import KEY, LeftOut
from luthier.training.watch.nonfinite import listed
from luthier.training.watch.waiting import Waiting

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Seq2SeqTrainingArguments


ASKED_BATCHES = 8
"""Every so many batches of an evaluation, the processes ask each other whether one of them got a signal."""


class StageTrainer(RetryingTrainer):
    """transformers.Trainer for any stage."""

    def __init__(self, args: "Seq2SeqTrainingArguments", parts: TrainingParts) -> None:
        evals = parts.eval_rows
        super().__init__(
            args,
            parts,
            model=parts.models.policy,
            train_dataset=parts.train_rows if parts.rollouts is None else parts.rollouts.step_rows,
            eval_dataset=evals[""] if set(evals) == {""} else dict(evals) or None,
            processing_class=parts.tokenizer,
            callbacks=list(parts.callbacks),
        )
        make_batch: Any = self.collate if parts.rollouts is None else parts.rollouts.numbers_or_batch
        self.data_collator = make_batch
        self.remove_callback(PrinterCallback)
        self.stage = parts.stage
        # The loss is divided by the units of the whole optimizer step, so accumulation must not divide it again.
        self.loss_is_scaled_for_ga = True
        self.num_trained_tokens = 0
        self.left_out = LeftOut(parts.recovery.on_nonfinite, parts.recovery.max_nonfinite_steps)
        self.waiting = Waiting()
        self._train_start_seconds = 0.0
        self._first_summed_step = 0
        """The loss is added up from the step after this one on."""
        self._flops_per_token: int | None = None

    def create_accelerator_and_postprocess(self) -> None:
        with fsdp_on_cpu(self.args), tensor_parallel_on_cpu(self.model):
            super().create_accelerator_and_postprocess()

    # -- one optimizer step -----------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step and their units; sampled answers if the stage has rollouts."""
        rollouts = self.parts.rollouts
        if rollouts is None:
            return super().get_batch_samples(self.waiting.timed(epoch_iterator), num_batches, device)
        num_batches = len(list(islice(epoch_iterator, num_batches)))
        with self.stop.in_step(may_give_up=self.may_give_up_step):
            step = rollouts.step(self.state.global_step, num_batches, self.stage_state)
        self.stage_state = step.state
        add_to(self._metrics, step.metrics)
        return step.batches, self._get_num_items_in_batch(step.batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> "Tensor":
        """The units of one optimizer step over all its micro-batches and all processes."""
        self.watch.require_finite_step(self.state.global_step)
        require_whole(batch_samples)
        if self.parts.reading is not None:
            self.parts.reading.take(batch_samples)
        counts = [self.counting.of(batch) for batch in batch_samples]
        units, tokens = sum(each.num_units for each in counts), sum(each.num_tokens for each in counts)
        mine = [[units, tokens, max(map(size_of, batch_samples))]]
        gathered = self.accelerator.gather(torch.tensor(mine, device=device))
        of_all = mine if self.accelerator.num_processes == 1 else gathered.tolist()  # the host waits for the device
        self.begin_step(batch_samples, float(max(size for _, _, size in of_all)))
        # Processes of tensor parallelism read the same rows.
        self.num_trained_tokens += int(sum(number for _, number, _ in of_all)) // self.get_tp_size()
        statistics = self.stage.statistics
        if statistics is not None:
            # A resumed run restores its random numbers after this, so these have a seed of their own (neftune).
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(self.args.seed + self.state.global_step)
                self.stage_state = self._state_for(statistics, self.model_wrapped, batch_samples, self.stage_state)
        if not self._train_start_seconds:
            self._train_start_seconds = time.monotonic()
        return gathered[:, 0].sum()

    def compute_loss(
        self, model: "nn.Module", inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        models = replace(self.parts.models, policy=model)
        output = self.stage.loss(models, inputs, self.parts.config, state=self.stage_state, training=True)
        add_to(self._metrics, output.metrics)
        # Gradients are averaged over processes, but this loss is already divided by the units of all of them.
        loss = output.total / num_items_in_batch * self.accelerator.num_processes
        self.watch.note(inputs, loss)
        return loss

    def _get_grad_norm(self, model: "nn.Module", grad_norm: Any = None) -> Any:
        """As in transformers, which calls it before each update. Leaves out one that is not finite, if that is asked.

        Several processes decide together. float16 has gradients that are infinite now and then, and a scaler that
        leaves out their update by itself.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.watch.note_gradient(torch.as_tensor(norm, device=self.args.device))
        if self.left_out.action == "stop":
            return norm
        is_fault = torch.tensor([bool(self.watch.fault())], device=self.args.device)
        is_left_out = bool(self.accelerator.gather(is_fault).any())
        self.left_out.count(is_left_out=is_left_out)
        if is_left_out:
            self._leave_out_update()
        return None if is_left_out else norm

    def _leave_out_update(self) -> None:
        """Raises `RunFailed` after `max_nonfinite_steps` such steps."""
        step, limit = self.state.global_step + 1, self.left_out.limit
        faults: list[tuple[str, list[str]]] = gather_object([(self.watch.fault(), self.watch.rows())])
        what, rows = max(faults, key=lambda fault: (bool(fault[0]), "loss" in fault[0]))
        self.watch.forget()
        total = self.noted.get(KEY, 0) + 1
        if total > limit:
            more = f" after {limit} steps that were left out (max_nonfinite_steps)" if limit else ""
            raise self.watch.failure(what + more, step, f"; the rows of this step:{listed(rows)}")
        self.noted[KEY] = total
        if self.accelerator.scaler is None:
            self.accelerator.gradient_state._set_sync_gradients(False)  # so that accelerate makes no update
        assert self._begun.loss is not None, "the step has begun"
        self._tr_loss, self._metrics = self._begun.loss, dict(self._begun.metrics)
        self.stage_state = self._begun.stage_state
        saved = self.go_back() if self.left_out.action == "rollback" else None
        then = "its update is left out" if saved is None else f"weights and optimizer go back to {saved}"
        warn(
            f"step {step}: {what}, so {then}, and training continues after it ({total} of at most {limit}, see"
            f" max_nonfinite_steps); the rows of this step:{listed(rows)}"
        )

    def create_optimizer(self, model: "nn.Module | None" = None) -> Any:
        with accepted("optim", str(OptimizerNames(self.args.optim).value)):
            if self.parts.build_optimizer is not None:
                self.optimizer = self.parts.build_optimizer(self.policy if model is None else model, self.args)
                return self.optimizer
            return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            if not self.num_trained_tokens:
                return  # the run was already complete, so there is no mean loss
            num_steps = self.state.global_step - self._first_summed_step
            logs["train_loss"] = self._total_loss_scalar / max(num_steps, 1)
            total = self.left_out.here if self._first_summed_step else self.noted.get(KEY, 0)
            self.left_out.correct_end(logs, num_steps, total)
        if "loss" in logs:
            self.watch.require_finite_step(self.state.global_step)
            self.left_out.correct_line(logs, self.noted.get(KEY, 0))
            if not math.isfinite(logs.get("loss", 0.0)):
                raise self.watch.failure(f"the loss became {logs['loss']}", self.state.global_step)
            totals = over_processes(self._metrics, self.args.device)
            means = {name: total / count for name, (total, count) in totals.items() if count}
            logs |= {**means, **self.stage.reporting.derived(means)}
            self._metrics = {}
            logs["throughput"] = round(self.throughput(), 2)
            for gauge in self.parts.gauges:
                logs |= gauge()
        super().log(logs, start_time)

    def unlogged(self) -> Unlogged:
        steps = self.left_out.since_log
        return Unlogged.of(
            self._globalstep_last_logged,
            self._total_loss_scalar,
            self._tr_loss,
            self._metrics,
            (steps[False], steps[True]),
        )

    def _take_up_log(self) -> None:
        """Go on with the sums of the checkpoint that the run was resumed from."""
        self._first_summed_step = self.state.global_step
        found = Unlogged.saved(self.noted)
        if found is None or not self.state.global_step:
            return
        self._first_summed_step, self._globalstep_last_logged = 0, found.last_line
        self._total_loss_scalar = found.logged_loss
        self._tr_loss += found.loss
        self._metrics = found.sums(self.args.device, is_first=self.args.process_index == 0)
        self.left_out.since_log = {False: found.left_out[0], True: found.left_out[1]}

    def _state_for(
        self, statistics: StepStatistics, model: Any, batches: Iterable[Any], state: StageState
    ) -> StageState:
        """`state` updated with these batches, over all processes."""
        models, config = replace(self.parts.models, policy=model), self.parts.config
        sums: dict[str, tuple[Tensor, float | Tensor]] = {}
        for more in batch_by_batch(
            batches, self.args.device, lambda batch: statistics.sums(models, batch, config, state=state)
        ):
            add_to(sums, more)
        totals = over_processes(sums, self.args.device)
        means = {name: (total / count if count else 0.0, count) for name, (total, count) in totals.items()}
        return statistics.update(state, means, config)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """As in transformers, but tokens that several texts share count in each of them, and only padding counts as
        padding."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        counts_padding = self.args.include_num_input_tokens_seen == "all" and "attention_mask" in inputs
        num_tokens = inputs["input_ids"].numel() if counts_padding else self.counting.of(inputs).num_tokens
        gathered = self.accelerator.gather(torch.tensor(num_tokens, device=self.args.device))
        self.state.num_input_tokens_seen += int(gathered.sum())

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
        return self.parts.reading.loader(self._train_batch_size, self.collate)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        drops_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops_last and kwargs.get("is_training", False)  # all rows are evaluated
        try:
            with rows_by_group(self.accelerator, self.parts.groups):
                loader = super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops_last
        serve(getattr(loader, "base_dataloader", loader))  # the one that starts workers
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """The rows of a step. Processes that share the tokens of a batch count once."""
        sharing = 1 if self.parts.groups is None else self.parts.groups.size
        return super().get_total_train_batch_size(args) // sharing

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        if not self.parts.shuffle:
            return SequentialSampler(rows)
        rows = as_long_as(rows) if self.args.train_sampling_strategy in BY_LENGTH else rows
        return by_epoch(super()._get_train_sampler(rows), self.args)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Stops at `max_steps`: transformers takes one more step when it resumes from the last one."""
        if not self.num_trained_tokens:
            self._take_up_log()
        begin_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        self._make_up_for_evaluation(kwargs["trial"], kwargs["ignore_keys_for_eval"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        elif not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        tell_long_warm_up(self.args, num_training_steps)
        given: Any = self.args.lr_scheduler_kwargs or {}
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in given:
            # transformers has no default; as in LLaMA-Factory, the first third after the warm-up is stable.
            num_left = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            num_stable = given.get("num_stable_steps", num_left // 3)
            self.args.lr_scheduler_kwargs = {**given, "num_decay_steps": max(num_left - num_stable, 0)}
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
        device, is_alone, follows = self.args.device, self.accelerator.num_processes == 1, partial(follow, self)
        self.callback_handler.eval_dataloader = dataloader
        with averaged(self.optimizer), self.stop.evaluating(is_alone=is_alone):
            # Reading batches consumes random numbers, which must not change the training that follows.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                totals = over_processes(self._evaluation_sums(model, dataloader), device)
            means = {name: t / n if n else math.nan for name, (t, n) in totals.items() if n or name == "loss"}
            means |= self.stage.reporting.derived(means)
            if self.parts.eval_metrics is not None:
                means |= self.parts.eval_metrics(model, metric_key_prefix, follows)
            metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
            if self.parts.task_metrics is not None:
                metrics |= self.parts.task_metrics(model, metric_key_prefix, follows)
        # Predictions are written by `luthier.workflow.predict`.
        return EvalLoopOutput(np.empty(0), None, metrics, self.num_examples(dataloader))

    def _evaluation_sums(self, model: "nn.Module", dataloader: Any) -> "dict[str, tuple[Tensor, float | Tensor]]":
        """Loss and metrics of this process: name -> (sum, count)."""
        models, config = replace(self.parts.models, policy=model), self.parts.config
        state: StageState = {}
        if self.stage.statistics is not None:
            state = self._state_for(self.stage.statistics, model, dataloader, state)
        batch_numbers = count()

        def compute(batch: dict[str, Any]) -> Sums:
            if next(batch_numbers) % ASKED_BATCHES == 0:
                self._require_time()
            output = self.stage.loss(models, batch, config, state=state, training=False)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            return {"loss": (output.total, self.counting.of(batch).num_units), **output.metrics}

        sums: dict[str, tuple[Tensor, float | Tensor]] = {}
        for more in batch_by_batch(dataloader, self.args.device, compute):
            add_to(sums, more)
        return sums

    def _require_time(self) -> None:
        """Raises `GaveUp` in all processes if one of them has a signal. All of them evaluate as many batches."""
        has_signal = torch.tensor([self.stop.has_signal], device=self.args.device)
        if bool(self.accelerator.gather(has_signal).any()):
            raise GaveUp

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = self.args.metric_for_best_model
        if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            raise RunFailed(
                f"metric_for_best_model: {wanted}: is not an evaluation metric"
                f" -> use one of {', '.join(sorted(metrics))}"
            )
        self.best_saved = (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)
        return super()._determine_best_metric(metrics, trial)
