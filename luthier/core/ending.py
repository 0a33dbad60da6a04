"""The end of a process without taking apart all that it has imported, which takes a second of CPU time after PyTorch.

As in the child processes of `multiprocessing`: threads have been waited for, functions of `atexit` have run, and output
and open files are flushed. Objects that are still there are not destroyed, so this is for commands that leave nothing
unwritten in them, and where a thread could use PyTorch while the interpreter is taken apart, which aborts the process:

- one of several processes of a run, where a thread of PyTorch gives back a tensor. A run that has succeeded would end
  with SIGABRT (https://github.com/pytorch/pytorch/issues/190489).
- a command that was interrupted while a thread of ours loads a model or computes a reward: nothing waits for it
  (`core/threads.py`), so the status would be that of SIGABRT and not 130.

A program that calls `luthier.train` ends in its own way. There `leave_group_at_end` waits for the threads of PyTorch.
"""

import atexit
import gc
import io
import os
import sys
from contextlib import suppress
from functools import cache


class QuickEnd:
    """To be made before anything else is imported: functions of `atexit` that are registered later run before it. If
    there are earlier ones, e.g. of a tool that measures coverage, the process ends in the ordinary way. So it does
    without a status."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Of the process; set once the command has succeeded, failed without an exception, or was interrupted."""
        if not atexit._ncallbacks():
            atexit.register(self._leave)

    def _leave(self) -> None:
        if self.status is not None:
            end_now(self.status)


@cache
def leave_group_at_end() -> None:
    """Leave the process group when the program ends, before the interpreter is taken apart: PyTorch then waits for the
    threads of the group, which so give back their tensors in time.

    For a group that luthier has made, in a run that has succeeded: after a failure, a thread may wait for a process
    that is gone. It is kept until then, since a program may train several times.
    """
    atexit.register(_leave_group)


def _leave_group() -> None:
    from torch import distributed

    gc.collect()  # what was trained refers to the group, so its threads would live on
    if distributed.is_initialized():
        distributed.destroy_process_group()


def end_now(status: int) -> None:
    """End the process as it is, with all output written. Returns if standard output cannot be written: at its ordinary
    end the interpreter tries again, and sets the status."""
    import ctypes

    flush_files()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    ctypes.CDLL(None).fflush(None)  # what C libraries have printed
    os._exit(status)


def flush_files() -> None:
    """Write what open files of this process hold back, as the interpreter does when it takes them apart."""
    for file in gc.get_objects():
        # `isinstance` would ask objects that stand for others, which might import something now.
        if issubclass(type(file), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with suppress(OSError, ValueError):  # closed, or not possible, which an ordinary end would not tell either
                file.flush()
