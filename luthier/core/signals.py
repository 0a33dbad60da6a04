"""Ctrl-C and SIGTERM while a command prepares its work or ends it: both end it with status 130, cleaned up. And the
signal that ends a process with the one that started it.

Training has handlers of its own, which save a checkpoint: `luthier.training.callbacks.interrupt`.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any, Literal

STOPPING = (signal.SIGINT, signal.SIGTERM)
TERMINATION_SECONDS = 0.5
"""What daemons have to end after SIGTERM."""
_PR_SET_PDEATHSIG = 1
"""The option of Linux's prctl(2) for the signal that a process gets when the one that started it ends."""


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """The first signal raises `KeyboardInterrupt`; a second one kills the process at once, whatever it is doing.

    A shell that starts a program in the background lets it ignore Ctrl-C, and so it does.
    """
    previous: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in STOPPING}
    taken = [number for number in STOPPING if previous[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in taken:
            # After a signal only the end is left, which a second one need not wait for.
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, previous[number])


def _interrupt(number: int, frame: FrameType | None) -> None:
    for stopping in STOPPING:
        signal.signal(stopping, signal.SIG_DFL)
    raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Serving:
    """The start of a worker of a data loader, which serves its process until that one ends. A terminal sends Ctrl-C to
    all of them, and the process still needs batches for the step that it finishes. Workers that are not forked, as in
    Python 3.14, do not inherit its handlers, and those that start while signals are held wait for it with them."""

    begin: Callable[[int], None] | None = None
    """What else a worker does first."""

    def __post_init__(self) -> None:
        _end_workers_with(os.getpid())

    def __call__(self, worker: int) -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # what has come meanwhile is ignored, too
        if self.begin is not None:
            self.begin(worker)


@contextmanager
def holding_signals(start_method: Literal["fork", "spawn"]) -> Iterator[None]:
    """While open, Ctrl-C and SIGTERM wait, in this thread and in the processes that it starts by `start_method`.

    A process inherits which signals wait. One that is spawned begins with the handlers of Python, and would end by a
    signal that comes while it imports its modules.
    """
    if start_method == "spawn":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # begins with the first process, and lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache(maxsize=1)
def _end_workers_with(pid: int) -> None:
    """At the end of a process, `multiprocessing` sends SIGTERM to its daemons and waits until they have ended. Where an
    exception has kept a data loader alive, its workers still serve, and ignore it."""
    from multiprocessing.util import Finalize  # a command that trains nothing needs none of it

    Finalize(None, _end_daemons, exitpriority=0)


def _end_daemons() -> None:
    import multiprocessing

    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if not daemons:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch has a handler that takes the end of a worker for a fault
    for child in daemons:
        child.terminate()
    end = time.monotonic() + TERMINATION_SECONDS
    for child in daemons:
        child.join(max(end - time.monotonic(), 0.0))
        if child.is_alive():
            child.kill()


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, even by SIGKILL. Does nothing but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
