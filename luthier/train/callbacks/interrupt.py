"""Ctrl-C (and SIGTERM) during training: finish the step, save a checkpoint, stop. A second one stops at once."""

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from luthier.core.log import warn


class StopOnSignal(TrainerCallback):
    """Turns a signal into a clean stop; `was_interrupted` tells afterwards."""

    def __init__(self) -> None:
        self.was_interrupted = False
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        warn("stopping: this step is finished and a checkpoint is saved; press Ctrl-C again to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.was_interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
