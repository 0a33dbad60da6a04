"""Ctrl-C (and SIGTERM) during training: finish the step, save a checkpoint, stop. A second one stops at once.

With several processes a signal reaches them at different moments, in different steps. Who has it writes the step after
its own into the store that all share. No process can end that step before: its gradients need those of all others. So
all of them read the same number in time, and nothing is exchanged in the other steps.
"""

import math
import signal
from itertools import count
from types import FrameType
from typing import Any, Self

from torch import distributed
from transformers import TrainerCallback

from luthier.core.log import warn

_trainings = count()
"""Numbers the trainings of this process, which may share one store."""


class StopOnSignal(TrainerCallback):
    """Context manager that turns a signal into a clean stop; `was_interrupted` says that training was stopped by it.

    `was_interrupted` is the same on all processes: a signal to any of them stops all of them.
    """

    def __init__(self) -> None:
        self.was_interrupted = False
        self.has_signal = False
        self.previous: dict[int, Any] = {}
        self.shared_name = f"luthier/last_step/{next(_trainings)}"

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.has_signal:
            raise KeyboardInterrupt
        self.has_signal = True
        warn("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last_step(state.global_step):
            self.was_interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def last_step(self, step: int) -> float:
        """The step that all processes stop after; infinite without a signal. `step` has just ended."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return step if self.has_signal else math.inf
        store = distributed.distributed_c10d._get_default_store()
        if self.has_signal:
            store.compare_set(self.shared_name, "", str(step + 1))
        return int(store.get(self.shared_name)) if store.check([self.shared_name]) else math.inf
