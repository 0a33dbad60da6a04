"""Ctrl-C (and SIGTERM) during training: finish the step, save a checkpoint, stop. A second one stops at once."""

import signal
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback

from luthier.core.log import warn


class StopOnSignal(TrainerCallback):
    """Context manager that turns a signal into a clean stop and then sets `was_interrupted`."""

    def __init__(self) -> None:
        self.was_interrupted = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        warn("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.was_interrupted:
            control.should_save = True
            control.should_training_stop = True
