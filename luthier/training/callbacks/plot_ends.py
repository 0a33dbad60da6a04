"""Logs the first and the last step for `plot_loss`, so that a long `logging_steps` leaves enough points for a line."""

from typing import Any

from transformers import TrainerCallback


class PlotEnds(TrainerCallback):
    """`stops_early`: an evaluation may end the run, so each step that is evaluated is logged as well."""

    def __init__(self, *, stops_early: bool) -> None:
        self.stops_early = stops_early

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 or control.should_training_stop or self._may_stop(control):
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._may_stop(control):
            control.should_log = True

    def _may_stop(self, control: Any) -> bool:
        return self.stops_early and bool(control.should_evaluate)
