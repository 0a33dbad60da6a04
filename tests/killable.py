"""Training runs in processes of their own that may be killed, for the price of a fork instead of a start.

Everything that a run imports is imported once, by the fork server of `multiprocessing`, which computes nothing itself.
"""

import itertools
import json
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

import luthier
from luthier.cli import main
from luthier.core.ports import free_port
from tests.runs.each_of import train_each

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.run_imports", __name__])


def start(
    keys: dict[str, Any],
    log: Path,
    num_processes: int = 1,
    *,
    command: str | None = None,
    changes: Callable[[], None] | None = None,
) -> BaseProcess:
    """A run in a process group of its own. What it says is added to `log`.

    `command`: as `luthier COMMAND` on a run file, which need not be `train`.
    `changes` is called in each process before the run, and may change what it does: see `at_call`.
    """
    keep_folder_apart()
    process = _server.Process(target=_train, args=(keys, str(log), num_processes, free_port(), command, changes))
    process.start()
    return process


def keep_folder_apart() -> None:
    """`multiprocessing` removes its folder at the end, when that of the tests is gone (`tests/conftest.py`)."""
    inside, tempfile.tempdir = tempfile.tempdir, os.environ.get("PYTEST_DEBUG_TEMPROOT")
    multiprocessing.util.get_temp_dir()
    tempfile.tempdir = inside


def wait(process: BaseProcess, kill_at: float = math.inf, delay_seconds: float = 0.0) -> float:
    """Waits for the end of a run. Returns the seconds of a CPU that it has used, however busy the machine is.

    Once they are `kill_at` it is killed, `delay_seconds` later, since it may wait for the disk then.
    """
    used = 0.0
    with suppress(psutil.NoSuchProcess):  # it has ended
        seen = psutil.Process(process.pid)
        while process.exitcode is None and used < kill_at:
            used = sum(seen.cpu_times()[:2])
            process.join(0.005)
    if used >= kill_at:
        process.join(delay_seconds)
        kill(process)
    process.join()
    return used


def kill(process: BaseProcess) -> None:
    """SIGKILL to the whole group, as a scheduler or the kernel does."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet, or has ended
        process.kill()
    process.join()


def start_each(run_files: Sequence[Path], log: Path, num_processes: int) -> BaseProcess:
    """The runs one after another, each in all processes: see `tests.runs.each_of`."""
    keep_folder_apart()
    process = _server.Process(target=_train_each, args=(run_files, str(log), num_processes, free_port()))
    process.start()
    return process


def at_call(owner: Any, name: str, count: int, what: Callable[[], Any], rank: int = 0) -> None:
    """In one process of a run, `what` happens before call number `count`, from 1, of `owner.name`."""
    call, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments: Any, **more: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == rank and next(calls) == count:
            what()
        return call(*arguments, **more)

    setattr(owner, name, counted)


def _train(
    keys: dict[str, Any],
    log: str,
    num_processes: int,
    port: int,
    command: str | None,
    changes: Callable[[], None] | None,
) -> None:
    _say_in(log)
    others = _begin_others(num_processes, port)
    if changes is not None:
        changes()
    if command is not None:
        run_file = Path(f"{log}.json")
        run_file.write_text(json.dumps(keys))
        status = main([command, str(run_file)])
        sys.stderr.flush()
        os._exit(status)
    luthier.train(keys)
    _end_with(others)


def _train_each(run_files: Sequence[Path], log: str, num_processes: int, port: int) -> None:
    _say_in(log)
    others = _begin_others(num_processes, port)
    train_each(run_files)
    _end_with(others)


def _say_in(log: str) -> None:
    os.setsid()
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(number, stream)
    sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115  # until the end


def _begin_others(num_processes: int, port: int) -> list[int]:
    """Forks the other processes of a run. Returns their ids in the first one, and nothing in these."""
    others: list[int] = []
    rank = 0
    for other in range(1, num_processes):
        pid = os.fork()
        if not pid:
            others, rank = [], other
            break
        others.append(pid)
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return others


def _end_with(others: list[int]) -> None:
    sys.stderr.flush()
    statuses = [os.waitpid(pid, 0)[1] for pid in others]
    os._exit(max(statuses, default=0) and 1)
