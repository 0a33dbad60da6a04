"""The end of a process without taking apart all that it has imported, which takes a second of CPU time after PyTorch.

As in the child processes of `multiprocessing`: threads have been waited for, functions of `atexit` have run and output
is flushed. Objects that are still there are not destroyed, so this is for commands that leave nothing unwritten in
them.
"""

import atexit
import os
import sys


class QuickEnd:
    """To be made before anything else is imported: functions of `atexit` that are registered later run before it. If
    there are earlier ones, e.g. of a tool that measures coverage, the process ends in the ordinary way. So it does
    without a status."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Of the process; set once the command has succeeded or failed without an exception."""
        if os.name == "posix" and not atexit._ncallbacks():
            atexit.register(self._leave)

    def _leave(self) -> None:
        if self.status is None:
            return
        import ctypes

        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # the interpreter tries again and sets the status
        ctypes.CDLL(None).fflush(None)  # what C libraries have printed
        os._exit(self.status)
