"""Starts, stops, resumes and deletes runs. A run outlives whoever started it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from luthier.core.errors import InvalidInput, OutputError, RunFailed
from luthier.core.files import write_atomically
from luthier.core.manifest import EXIT, RECORD, RUN_FILE, STOP
from luthier.webui import identity
from luthier.webui.evaluations import words_for
from luthier.webui.runs import Run, is_run, read_object, read_run

START_SECONDS = 60.0
"""How long the process that keeps a run may take to start it."""
_POLL_SECONDS = 0.02
_LUTHIER = (sys.executable, "-m", "luthier")


def start(folder: Path, text: str, command: str = "train", words: Sequence[str] = ()) -> Run:
    """Write the run file `text` into `folder` and run `luthier COMMAND` with it and `words`.

    Relative paths in the run file are those of the working folder. Raises `OutputError` if the folder cannot be used
    or a run is going on in it, and `RunFailed` if the process does not start.
    """
    if read_run(folder).is_live:
        raise OutputError(f"output_dir: {folder}: a run is going on in this folder -> stop it, or name another folder")
    write_atomically(folder / RUN_FILE, text)
    (folder / RECORD).unlink(missing_ok=True)
    (folder / EXIT).unlink(missing_ok=True)
    keeper = subprocess.Popen(
        [sys.executable, "-m", "luthier.webui.keeper", str(folder), *_LUTHIER, command, str(folder / RUN_FILE), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    threading.Thread(target=keeper.wait, daemon=True, name="keeper").start()  # a process that has ended is collected
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if read_object(folder / RECORD) or read_object(folder / EXIT):
            return read_run(folder)
        if keeper.poll() is not None:
            break
        time.sleep(_POLL_SECONDS)
    raise RunFailed(f"{folder}: the run could not be started -> see console.log in this folder")


def stop(run: Run) -> None:
    """Ask a run to finish its step, save a checkpoint and end. Asked again, it ends at once."""
    _require_reachable(run)
    if run.state != "stopping":
        write_atomically(run.folder / STOP, f'{{"asked": {time.time()}}}\n')
    identity.send(run.pid, run.mark, signal.SIGINT)


def kill(run: Run) -> None:
    """End a run at once. Checkpoints that are complete stay so."""
    _require_reachable(run)
    write_atomically(run.folder / STOP, f'{{"asked": {time.time()}}}\n')
    identity.send(run.pid, run.mark, signal.SIGKILL)


def resume(run: Run) -> Run:
    """Run the same command again; training resumes from its latest complete checkpoint.

    Raises `InvalidInput` without a run file.
    """
    if not run.text:
        raise InvalidInput(f"{run.folder}: has no run file -> start it with `luthier train`")
    argv = read_object(run.folder / RECORD).get("argv")
    command = argv[len(_LUTHIER)] if isinstance(argv, list) and len(argv) > len(_LUTHIER) else "train"
    words: tuple[str, ...] = ("overwrite_output_dir=false",) if command == "train" else ()
    if command == "eval":
        words = words_for(run.folder)
    return start(run.folder, run.text, command, words)


def delete(run: Run, root: Path) -> None:
    """Remove the folder of a run with all that it holds. Raises `OutputError` if it is live, or not inside `root`."""
    folder = run.folder.resolve()
    if read_run(run.folder).is_live:
        raise OutputError(f"{run.folder}: this run is going on -> stop it first")
    if run.folder.is_symlink() or folder == root.resolve() or root.resolve() not in folder.parents:
        raise OutputError(f"{run.folder}: is not inside {root} -> delete it in a terminal")
    if not is_run({path.name for path in folder.iterdir()}):
        raise OutputError(f"{run.folder}: holds no run")
    try:
        shutil.rmtree(folder)
    except OSError as fault:
        raise OutputError(f"{fault.filename or folder}: cannot be deleted ({fault.strerror})") from fault


def _require_reachable(run: Run) -> None:
    if not run.is_ours:
        where = f"runs on {run.host}" if run.host else "was started in a terminal"
        raise InvalidInput(f"{run.folder}: this run {where} -> stop it there")
