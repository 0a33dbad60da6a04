"""Ctrl-C (and SIGTERM) during training: finish the step, save a checkpoint, stop. A second one stops at once.

An evaluation is given up for a signal, and made up for when the run is resumed. So is a step, if there is a time by
which the checkpoint must be complete (`save_on_signal_seconds`) and finishing the step would take longer.

With several processes a signal reaches them at different moments, in different steps. Who has it writes the step after
its own into the store that all share. No process can end that step before: its gradients need those of all others. So
all of them read the same number in time, and nothing is exchanged in the other steps. For the same reason they never
give up a step; during an evaluation they ask each other now and then.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, Self

from torch import distributed
from transformers import TrainerCallback

from luthier.core.log import info, warn
from luthier.core.signals import STOPPING

_trainings = count()
"""Numbers the trainings of this process, which may share one store."""
SAVE_SHARE = 0.5
"""Of the time that a signal leaves, for a save of a run that has not saved yet."""
SAVE_MARGIN = 1.5
"""How much longer than the longest so far a save may take."""


class GaveUp(Exception):
    """A signal ended an evaluation or a step. The weights are those after the last whole step."""


class StopOnSignal(TrainerCallback):
    """Context manager that turns a signal into a clean stop; `was_interrupted` says that training was stopped by it.

    `was_interrupted` is the same on all processes: a signal to any of them stops all of them.

    Python handles signals in the main thread only, so training in another thread, as in a notebook or a server, leaves
    them alone.
    """

    def __init__(self, save_seconds: float | None = None) -> None:
        self.save_seconds = save_seconds
        self.was_interrupted = False
        self.has_signal = False
        self.process = 0
        self.signal_time = 0.0
        """When the signal came, by the monotonic clock."""
        self.longest_save_seconds: float | None = None
        self.previous: dict[int, Any] = {}
        self.shared_name = f"luthier/last_step/{next(_trainings)}"
        self._is_late = self._may_give_up = self._is_evaluating = False

    def __enter__(self) -> Self:
        self.process = os.getpid()
        if current_thread() is not main_thread():
            return self
        for number in STOPPING:
            self.previous[number] = signal.signal(number, self.handle)
        self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.give_up_step)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # of the loader, which serves this process until it ends
            return
        if self.has_signal:
            raise KeyboardInterrupt
        self.has_signal, self.signal_time = True, time.monotonic()
        if self.save_seconds is not None:
            longest = self.longest_save_seconds
            save = self.save_seconds * SAVE_SHARE if longest is None else longest * SAVE_MARGIN
            signal.setitimer(signal.ITIMER_REAL, max(self.save_seconds - save, 0.001))
        warn("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")
        if self._is_evaluating:
            raise GaveUp

    def give_up_step(self, number: int, frame: FrameType | None) -> None:
        self._is_late = True
        if self._may_give_up:
            raise GaveUp

    @contextmanager
    def in_step(self, *, may_give_up: bool) -> Iterator[None]:
        """While open, weights do not change, and the step may be given up when time is short. Raises `GaveUp`."""
        if may_give_up and self._is_late:
            raise GaveUp
        self._may_give_up = may_give_up
        try:
            yield
        finally:
            self._may_give_up = False

    @contextmanager
    def evaluating(self, *, is_alone: bool) -> Iterator[None]:
        """While open, a signal raises `GaveUp` at once if this process is alone."""
        self._is_evaluating = is_alone
        try:
            yield
        finally:
            self._is_evaluating = False

    def note_save(self, seconds: float) -> None:
        """A save has ended, which took so long."""
        limit, longest = self.save_seconds, self.longest_save_seconds
        if limit is not None and seconds > limit and (longest is None or longest <= limit):
            warn(
                f"save_on_signal_seconds: {limit:g}: this checkpoint took {seconds:.1f} s, so none can be complete in"
                " time -> save less (save_only_model), or to a faster disk"
            )
        self.longest_save_seconds = max(seconds, longest or 0.0)
        if not self.has_signal:
            return
        since = time.monotonic() - self.signal_time
        told = f"the checkpoint is complete {since:.1f} s after the signal"
        if limit is None or since <= limit:
            info(told)
        else:
            warn(f"{told}, later than save_on_signal_seconds: {limit:g} -> smaller batches let it begin sooner")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last_step(state.global_step):
            self.stop(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What an epoch ends with is left to the resumed run, unless the signal came in its last step."""
        if self.was_interrupted and state.epoch % 1 and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = False

    def stop(self, control: Any) -> None:
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
