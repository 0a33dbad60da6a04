"""One run of a sweep: a process of its own in a folder of its own.

    FOLDER/board.yaml     its run file
    FOLDER/console.log    what it printed, of all its starts
    FOLDER/exit.json      {"status", "ended"}: how it ended
    FOLDER/...            everything else that `luthier train` leaves

These are the names of the board, whose pages therefore show the runs of a sweep while they go on.

Why a process for each run: whatever libraries hold on to is freed when it ends, the memory of accelerators included; a
crash costs one run, and so does the killer of the system; several devices are used through torchrun as always.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, Self

import yaml

from luthier.core.drafts import is_draft
from luthier.core.errors import OutputError, Problem
from luthier.core.files import write_atomically
from luthier.core.manifest import CONSOLE, EXIT, MANIFEST_NAME, RUN_FILE
from luthier.workflow.launch.child import command_of
from luthier.workflow.launch.run_files import run_file
from luthier.workflow.sweep.grid import GridRun

RESUME = "resume_from_checkpoint"
INTERRUPTED = 130
State = Literal["waiting", "done", "stopped", "failed"]
_TAIL_BYTES = 16384
MAX_ERROR_CHARS = 300
_OWN_ERROR = re.compile(r"^luthier: (.*(?:\n  .*)*)", re.MULTILINE)


def problem_of(one: GridRun) -> Problem | None:
    """Why a run cannot use its folder: it holds a run with other keys, or something else."""
    folder = one.folder
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if all(name == CONSOLE or is_draft(name) for name in held):
        return None
    earlier = _earlier_keys(folder)
    remedy = "choose another output_dir, or remove this folder"
    if earlier is None:
        return Problem("output_dir", f"{folder} holds something that no sweep wrote", remedy)
    differing = _differences(earlier, run_file(one.keys()).keys)
    if not differing or not (state_of(folder) == "done" or any(folder.glob("checkpoint-*"))):
        return None
    return Problem("output_dir", f"{folder} holds a run with other keys ({'; '.join(differing)})", remedy)


def _earlier_keys(folder: Path) -> dict[str, Any] | None:
    try:
        keys = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return keys if isinstance(keys, dict) else None


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def shown(keys: Mapping[str, Any], name: str) -> str:
        return str(keys[name]) if name in keys else "unset"

    names = [name for name in {**earlier, **now} if name != RESUME and earlier.get(name) != now.get(name)]
    return [f"{name}: {shown(earlier, name)} there, {shown(now, name)} here" for name in names]


def state_of(folder: Path) -> State:
    """How the last start of a run ended. `waiting`: it has not begun, or was killed."""
    status = status_of(folder)
    if status is None:
        return "waiting"
    if status == 0:
        return "done" if (folder / MANIFEST_NAME).is_file() else "waiting"
    return "stopped" if status == INTERRUPTED else "failed"


def status_of(folder: Path) -> int | None:
    try:
        status = json.loads((folder / EXIT).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status if isinstance(status, int) else None


def error_of(folder: Path) -> str:
    """Why a run failed: the error that luthier printed last, else the signal, else the last line of its output."""
    with (folder / CONSOLE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    text = text.rpartition("\n$ luthier ")[2]
    status = status_of(folder) or 0
    own = _OWN_ERROR.findall(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if own:
        return textwrap.shorten(own[-1], MAX_ERROR_CHARS, placeholder=" …")
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + (
            ", perhaps out of memory" if -status == signal.SIGKILL else ""
        )
    return lines[-1] if len(lines) > 1 else f"exit status {status}"


class RunProcess:
    """A context in which a run goes on.

    Its session is its own: a terminal would send Ctrl-C to it as well, and a second signal makes a run leave at once.
    On Linux it ends with this process, even by SIGKILL. Elsewhere the lock of its console keeps others out.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any]) -> None:
        """`keys`: decoded ones, with `folder` as `output_dir`."""
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = locked(self.folder / CONSOLE)
        if any(self.folder.glob("checkpoint-*")):  # it resumes from its own
            keys = {name: value for name, value in keys.items() if name != RESUME}
        file = run_file(keys)
        write_atomically(self.folder / RUN_FILE, file.text)
        (self.folder / EXIT).unlink(missing_ok=True)
        self.environment = {**os.environ, **file.environment}
        self.environment.pop("USE_RAY", None)

    def __enter__(self) -> Self:
        path = str(self.folder / RUN_FILE)
        self.console.write(f"$ luthier train {path}\n".encode())
        self.process = subprocess.Popen(
            command_of(["train", path]),
            stdin=subprocess.DEVNULL,
            stdout=self.console,
            stderr=self.console,
            env=self.environment,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.console.close()

    def wait(self) -> State:
        """Returns when the run has ended and its end is written down."""
        status = self.process.wait()
        write_atomically(self.folder / EXIT, json.dumps({"status": status, "ended": time.time()}) + "\n")
        return state_of(self.folder)


class SignalsTo:
    """A context in which SIGINT and SIGTERM are passed on to a process, so that it can save a checkpoint."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process, self.was_asked = process, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        self.process.send_signal(number)


def locked(path: Path) -> IO[bytes]:
    """The console of a run. The process of the run inherits the lock, so it lasts as long as that process."""
    console = path.open("ab", buffering=0)
    try:
        fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        console.close()
        raise OutputError(f"output_dir: {path.parent}: a run is going on in this folder -> wait for its end") from None
    return console
