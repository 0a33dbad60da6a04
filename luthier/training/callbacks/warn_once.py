"""Tells what the log of a run shows to be wrong, once (`luthier.stages.Reporting.warns`)."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from luthier.core.log import warn

LINES_IN_A_ROW = 5
"""Fewer may be chance, unless the run has no others."""


class WarnOnce(TrainerCallback):
    """`finds`: (a line of the log) -> what is wrong, or an empty text."""

    def __init__(self, finds: Callable[[Mapping[str, float]], str]) -> None:
        self.finds = finds
        self.found = ""
        self.num_lines, self.num_in_a_row, self.has_told = 0, 0, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.found = self.finds(logs)
        self.num_lines += 1
        self.num_in_a_row = self.num_in_a_row + 1 if self.found else 0
        if self.num_in_a_row >= LINES_IN_A_ROW:
            self._tell(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < self.num_lines == self.num_in_a_row:
            self._tell(state.global_step)

    def _tell(self, step: int) -> None:
        if not self.has_told:
            self.has_told = True
            warn(f"step {step}: {self.found}")
