"""Names of files and folders that are not complete yet, and what becomes of those that a killed process left.

    .data_report.json.4711.h3f9a21c.tmp     .NAME.PID.HOST.tmp, beside the file or folder that it will become
    .4711.h3f9a21c.tmp                      inside the folder that its files will be moved to
    .stop.json.52.4711.h3f9a21c.tmp         the same of a thread, .NAME.THREAD.PID.HOST.tmp: another may write it too

A killed process cannot remove its drafts, so the next one does: it may remove what a process that has ended left.
"""

import glob
import hashlib
import os
import platform
import re
import shutil
import time
from pathlib import Path
from threading import current_thread, get_native_id, main_thread

ABANDONED_SECONDS = 3600.0
"""Whether a process of another machine still runs is not known; its draft is abandoned if nothing changes so long."""
_DRAFT = re.compile(r"\.(?:.*\.)?(\d{1,9})(?:\.(h[0-9a-f]{7}))?\.tmp")


def this_host() -> str:
    """Short and the same for all processes of this machine, since several machines may share a disk."""
    return "h" + hashlib.sha256(platform.node().encode()).hexdigest()[:7]


def draft_name(name: str = "") -> str:
    """What this thread calls the file or folder `name` while it is not complete."""
    thread = "" if current_thread() is main_thread() else f"{get_native_id()}."
    return f".{name}{'.' if name else ''}{thread}{os.getpid()}.{this_host()}.tmp"


def is_draft(name: str) -> bool:
    """Whether a file or folder of this name is not complete."""
    return _DRAFT.fullmatch(name) is not None


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove the drafts in `folder` (only those of `name`, if given) whose process has ended.

    Those of this process are removed too, so it must not be writing any of them.
    """
    prefix = f".{glob.escape(name)}." if name else "."
    for path in folder.glob(f"{prefix}*.tmp"):
        if _is_abandoned(path):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds. What cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def runs_here(number: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _is_abandoned(path: Path) -> bool:
    match = _DRAFT.fullmatch(path.name)
    if match is None:
        return False
    number, host = int(match[1]), match[2]
    if host in (None, this_host()):  # earlier versions did not write the host
        return not runs_here(number)
    return time.time() - _last_change_seconds(path) > ABANDONED_SECONDS


def _last_change_seconds(path: Path) -> float:
    """Of a file or of anything in a folder; now, if it is changing under our eyes."""
    try:
        return max(inner.stat().st_mtime for inner in (path, *path.rglob("*")))
    except OSError:
        return time.time()
