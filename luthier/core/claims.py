"""A folder that one process at a time works in: the others are refused, on this machine.

The lock is on the folder itself, so nothing lies in it, and the kernel lifts it when the process ends, however it ends.
On a disk that machines share, most file systems keep such a lock to one machine. So the restart of a run whose machine
was lost never waits for it, and two machines that write to one folder are not found out.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.core.errors import OutputError

_held: set[int] = set()
"""Open folders of this process. A fork would share their locks, and outlive it for some seconds."""


def _close_in_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_fork)


@contextmanager
def claiming(key: str, folder: Path) -> Iterator[None]:
    """While open, the existing `folder`, named by `key`, is that of this thread. Raises `OutputError` if it is taken.

    A disk without locks lets everybody in.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # it may be written to without being listed
        yield
        return
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{key}: {folder}: another run is going on in this folder (its heartbeat.json names the process), and"
                " nothing has been changed there -> wait for its end, or choose another folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)
