"""The log of a run by Megatron-Bridge: its events, told to the callbacks that luthier's own trainer has."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

LOSS = "lm loss"
"""What Megatron-Bridge calls the mean loss per token."""


class BridgeLog:
    """Its methods are named as the events of Megatron-Bridge, and `register` hands them over."""

    def __init__(
        self,
        args: "TrainingArguments",
        callbacks: "Sequence[TrainerCallback]",
        steps: int,
        batch_size: int,
        num_rows: int,
        save: Callable[[Any], None],
    ) -> None:
        """`steps`, `batch_size`: of the whole run, and rows per step over all processes. `save`: gets the model, in
        all processes together, when training has ended."""
        from transformers import TrainerControl, TrainerState

        self.args, self.callbacks, self.save = args, callbacks, save
        self.batch_size, self.num_rows = batch_size, num_rows
        self.logging_steps = steps_of(args.logging_steps, steps)
        is_main = args.process_index == 0
        self.state = TrainerState(max_steps=steps, is_world_process_zero=is_main, is_local_process_zero=is_main)
        self.control = TrainerControl()
        self.metrics: dict[str, dict[str, float]] = {}
        self.first_step = self.evaluated_step = 0
        self.start_seconds = 0.0
        self.learning_rate: float | None = None
        self.since_log = _Mean()
        self.overall = _Mean()

    def register(self, manager: Any) -> None:
        """`manager`: a CallbackManager of Megatron-Bridge."""
        for event in ("on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end", "on_eval_end"):
            manager.register(event, getattr(self, event))

    def on_train_start(self, context: Any) -> None:
        self.first_step = self.state.global_step = context.state.train_state.step
        self.start_seconds = time.time()
        self._tell("on_train_begin")

    def on_train_step_start(self, context: Any) -> None:
        groups = context.optimizer.param_groups
        self.learning_rate = float(groups[0]["lr"]) if groups else None
        self._tell("on_step_begin")

    def on_train_step_end(self, context: Any) -> None:
        loss = context.loss_dict.get(LOSS)  # only the processes of the last pipeline stage have it
        if loss is not None:
            self.since_log.add(loss)
            self.overall.add(loss)
        step = self.state.global_step = self.state.global_step + 1
        epochs_before = (step - 1) * self.batch_size // self.num_rows
        self.state.epoch = step * self.batch_size / self.num_rows
        self.control.should_log = self._logs(step, ends_epoch=int(self.state.epoch) > epochs_before)
        self._tell("on_step_end")
        if self.control.should_log:
            logs: dict[str, Any] = {"loss": from_last_process(self.since_log.value())}
            if context.grad_norm is not None:
                logs["grad_norm"] = float(context.grad_norm)
            if self.learning_rate is not None:
                logs["learning_rate"] = self.learning_rate
            self.since_log = _Mean()
            self._log(logs)

    def on_eval_end(self, context: Any) -> None:
        losses = context.total_loss_dict or {}
        loss = from_last_process(float(losses[LOSS]) if LOSS in losses else None)
        if loss is None or self.evaluated_step == self.state.global_step:
            return  # the last step may have been evaluated already, and its weights are the same
        self.evaluated_step = self.state.global_step
        self.metrics["eval"] = {"eval_loss": loss, "epoch": self.state.epoch}
        self._log({"eval_loss": loss})
        self._tell("on_evaluate", metrics=self.metrics["eval"])

    def on_train_end(self, context: Any) -> None:
        from transformers.trainer_utils import speed_metrics

        steps = self.state.global_step - self.first_step
        loss = from_last_process(self.overall.value())
        if steps and loss is not None:
            speed = speed_metrics("train", self.start_seconds, steps * self.batch_size, steps)
            self.metrics["train"] = {**speed, "train_loss": loss, "epoch": self.state.epoch}
            self._log(self.metrics["train"])
        self.save(context.model)

    def close(self) -> None:
        """After the last evaluation, or when the run has failed."""
        self._tell("on_train_end")

    def save_state(self) -> None:
        self.state.save_to_json(str(Path(str(self.args.output_dir), "trainer_state.json")))

    def _logs(self, step: int, *, ends_epoch: bool) -> bool:
        strategy = str(getattr(self.args.logging_strategy, "value", self.args.logging_strategy))
        if strategy == "epoch":
            return ends_epoch
        first = self.args.logging_first_step and step == 1
        return strategy == "steps" and (first or step % self.logging_steps == 0)

    def _log(self, logs: dict[str, Any]) -> None:
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", logs=logs)

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, model=None, **more)


class _Mean:
    """Of tensors, which are read only when it is asked for, so that the accelerator need not wait."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.count = 0

    def add(self, loss: Any) -> None:
        self.total = self.total + loss.detach()
        self.count += 1

    def value(self) -> float | None:
        return float(self.total) / self.count if self.count else None


def from_last_process(value: float | None) -> float | None:
    """The value that the last process has, which is in the last pipeline stage; all processes ask together."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=distributed.get_world_size() - 1)
    return values[0]


def steps_of(steps: float, total: int) -> int:
    """A number of steps; below 1 it is a share of `total`."""
    return max(1, int(steps) if steps >= 1 else math.ceil(total * steps))
