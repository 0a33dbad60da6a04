"""Ctrl-C and SIGTERM while a command prepares its work or ends it: both end it with status 130, cleaned up.

Training has handlers of its own, which save a checkpoint: `luthier.training.callbacks.interrupt`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


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
            if (
                signal.getsignal(number) is _interrupt
            ):  # else what is left to do is to end, and a second one need not wait
                signal.signal(number, previous[number])


def _interrupt(number: int, frame: FrameType | None) -> None:
    for stopping in STOPPING:
        signal.signal(stopping, signal.SIG_DFL)
    raise KeyboardInterrupt
