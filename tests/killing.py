"""A process that is killed before one of its changes to a folder, without a process: nothing after it reaches the disk.

The changes that Python announces to audit hooks are counted: files opened for writing, renamed and removed, folders
made and removed. From the chosen one on, each raises `Killed`, so no `finally` can clean up either.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Killed(BaseException):
    """Nothing in the product catches it."""


@dataclass
class _Watch:
    folder: Path
    kill_at: int | None
    changes: list[str] = field(default_factory=list)


_watches: list[_Watch] = []
_CHANGES = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watches:
        return
    watch = _watches[-1]
    if event == "open":
        path, mode, flags = args
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(c in (mode or "") for c in "wax+")
        if not isinstance(path, str | bytes | os.PathLike) or not writes:
            return
        what = "open"
    elif event in _CHANGES:
        path, what = args[0], _CHANGES[event]
    else:
        return
    name = os.fsdecode(path)
    if not os.path.isabs(name):
        where = args[1] if event in ("os.remove", "os.rmdir") else -1  # `shutil.rmtree` names files within a folder
        name = os.path.join(os.readlink(f"/proc/self/fd/{where}") if where >= 0 else os.getcwd(), name)
    if not Path(name).is_relative_to(watch.folder):
        return
    if watch.kill_at is not None and len(watch.changes) >= watch.kill_at:
        raise Killed
    watch.changes.append(f"{what} {Path(name).relative_to(watch.folder)}")


sys.addaudithook(_hook)


@contextmanager
def watching(folder: Path, kill_at: int | None = None) -> Iterator[list[str]]:
    """Yields the changes below `folder` as they happen. The process is killed before number `kill_at`, from 0."""
    _watches.append(_Watch(folder, kill_at))
    try:
        with suppress(Killed):
            yield _watches[-1].changes
    finally:
        _watches.pop()
