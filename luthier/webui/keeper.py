"""The parent of a run: starts it, waits for it, and writes down how it ended.

    python -m luthier.webui.keeper FOLDER COMMAND ARGUMENT...

It has a session of its own, so nothing that happens to the board, to a page or to a terminal reaches it or its run.
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from luthier.core.files import write_atomically
from luthier.core.manifest import CONSOLE, EXIT, RECORD, STOP
from luthier.webui.identity import mark_of

NOT_STARTED = 127
BUSY = 3
"""Exit status of this program if another keeper has the folder."""


def main(words: list[str]) -> int:
    folder, command = Path(words[0]), words[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A function and not SIG_IGN, which the run would inherit.
        signal.signal(number, _ignore)
    with (folder / CONSOLE).open("ab", buffering=0) as console:
        try:
            fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return BUSY
        for name in (RECORD, EXIT, STOP):
            (folder / name).unlink(missing_ok=True)
        console.write(f"$ {shlex.join(['luthier', *command[3:]])}\n".encode())
        status = _run(folder, command, console.fileno())
    _write(folder / EXIT, {"status": status, "ended": time.time()})
    return 0


def _run(folder: Path, command: list[str], console: int) -> int:
    """Start the command, note down its process, and return its exit status."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
        )
    except OSError as fault:
        os.write(console, f"luthier: {command[0]}: cannot be started ({fault.strerror})\n".encode())
        return NOT_STARTED
    record = {
        "argv": command,
        "pid": process.pid,
        "mark": mark_of(process.pid),
        "keeper_pid": os.getpid(),
        "keeper_mark": mark_of(os.getpid()),
        "host": platform.node(),
        "started": time.time(),
        "title": folder.name,
    }
    _write(folder / RECORD, record)
    try:
        return process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what the run may have left behind
            os.killpg(process.pid, signal.SIGKILL)


def _write(path: Path, value: dict[str, object]) -> None:
    write_atomically(path, json.dumps(value) + "\n")


def _ignore(number: int, frame: FrameType | None) -> None:
    """The run decides when it ends."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
