"""Saves the last checkpoint of an epoch, or of the run, after the line of the log and the evaluation that end the epoch
(`logging_strategy: epoch`, `eval_strategy: epoch`).

transformers saves it before them. A run that is resumed from it would lack both, and the loss in its next line would be
the mean of two epochs.
"""

from typing import Any

from transformers import TrainerCallback

EPOCH = "epoch"


class SaveAfterEpoch(TrainerCallback):
    """To be called after every callback that asks for a checkpoint."""

    def __init__(self) -> None:
        self.is_due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.epoch % 1 == 0 or state.global_step >= state.max_steps
        self.is_due = control.should_save and is_last and EPOCH in (args.logging_strategy, args.eval_strategy)
        if self.is_due:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_due:
            control.should_save, self.is_due = True, False
