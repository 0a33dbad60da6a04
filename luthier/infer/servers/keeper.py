"""Runs a program and ends it with all its children when whoever asked for it is gone, however that went.

    python keeper.py PROGRAM ARGUMENT...

Standard input is a pipe of the asking process. The kernel closes it when that process ends, even by SIGKILL, so a
server never outlives it and never keeps the memory of a GPU. Exits with the status of the program.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


def main(command: list[str]) -> int:
    signal.signal(signal.SIGTERM, _leave)
    # A signal that comes while the program is started waits until this process knows it, and can end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_take_signals)
    threading.Thread(target=_end_with_input, args=(program,), daemon=True).start()
    try:
        _take_signals()
        return program.wait()
    finally:
        end(program)


def end(program: "subprocess.Popen[bytes]") -> None:
    """End a program that leads a process group, and what is left of the group."""
    if program.poll() is None:
        _signal(program, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(GRACE_SECONDS)
    _signal(program, signal.SIGKILL)
    program.wait()


def _end_with_input(program: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1):
        pass
    end(program)


def _take_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def _signal(program: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty
        os.killpg(program.pid, number)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
