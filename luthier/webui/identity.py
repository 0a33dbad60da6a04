"""Whether a process that was noted down still runs, or another one has got its number since."""

import os
import signal
import sys
from pathlib import Path

_START_FIELD = 22
"""Of /proc/PID/stat: ticks between the start of the machine and that of the process; proc(5)."""


def mark_of(pid: int) -> str | None:
    """What tells this process from every other one that had or will have its number; None if there is no such one.

    A process that has ended and waits for its parent counts as none.
    """
    if sys.platform != "linux":
        return _mark_elsewhere(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    if fields[0] in "ZX":
        return None
    return f"{boot}:{fields[_START_FIELD - 3]}"


def _mark_elsewhere(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def is_same(pid: int, mark: str) -> bool:
    """Whether the process that had this mark still runs."""
    return pid > 0 and mark_of(pid) == mark


def send(pid: int, mark: str, number: int) -> bool:
    """Send a signal to exactly this process. Returns whether it was there and could be reached."""
    try:
        if sys.platform != "linux":
            if is_same(pid, mark):
                os.kill(pid, number)
                return True
            return False
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # The descriptor stays with the process, so that no other one can get the signal after the comparison.
        if not is_same(pid, mark):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
