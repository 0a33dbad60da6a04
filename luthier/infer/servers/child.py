"""A server program as a child process: started, waited for, watched, and ended for certain."""

import contextlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.core.errors import RunFailed
from luthier.core.log import info, warn
from luthier.core.ports import HOST
from luthier.infer.servers import keeper

TELL_SECONDS = 15.0
"""How often a user who waits is told so."""
_POLL_SECONDS, _ANSWER_SECONDS = 0.2, 10.0
_END_SECONDS = keeper.GRACE_SECONDS + 10
_TAIL_BYTES = 8192
_OF_A_LAUNCHER = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
}
"""What torchrun and Ray tell a process of training. A server is a group of processes of its own: with the variables of
torchrun its first process would wait for another one to open the store that it opens itself."""
_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def find_program(name: str) -> str | None:
    """The path of a program: beside this Python, else on PATH, where it may belong to another environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


class ChildServer:
    """A running server. It ends with `close`, when nobody refers to it any more, and with this process."""

    def __init__(self, name: str, command: Sequence[str], port: int, environ: Mapping[str, str]) -> None:
        """`command` serves HTTP on `port`. `environ`: variables beside those of this process, but for what a launcher
        has told it."""
        self.name, self.port = name, port
        number, path = tempfile.mkstemp(prefix=f"luthier-{name}-", suffix=".log")
        self.log = Path(path)
        """Standard output and error of the server. Removed at the end, unless the server died by itself."""
        with os.fdopen(number, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**_without_launcher(os.environ), **environ},
                start_new_session=True,  # Ctrl-C stops an answer, and not the server
            )
        self._is_closing = threading.Event()
        self._end = weakref.finalize(self, _end, self._process, self.log, self._is_closing)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ends_within(self, seconds: float) -> bool:
        """Whether the server has ended, or does so in this time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_until_healthy(self) -> None:
        """Until GET /health is 200. Raises `RunFailed` with the end of the log if the server ends before."""
        info(f"starting {self.name}; its log is {self.log}")
        started = told = time.monotonic()
        is_healthy = False
        try:
            while not (is_healthy := self._is_healthy()):
                if not self.is_alive:
                    raise self.failure("before it answered")
                if time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    info(f"waiting for {self.name} ({told - started:.0f} s): {self._last_lines(1) or 'no output yet'}")
                time.sleep(_POLL_SECONDS)
        finally:
            if not is_healthy:
                self.close()
        threading.Thread(
            target=_watch, args=(self.name, self._process, self.log, self._is_closing), daemon=True, name=self.name
        ).start()

    def failure(self, when: str = "") -> RunFailed:
        """The error that tells of the end of the server."""
        if self._is_closing.is_set():
            return RunFailed(f"{self.name} has been closed")
        lines = self._last_lines(3)
        return RunFailed(
            f"{self.name} ended {when + ' ' if when else ''}with status {self._process.wait()}"
            f" -> its log says why: {self.log}{', which ends: ' + lines if lines else ''}"
        )

    def close(self) -> None:
        """End the server and all its processes, and wait for that."""
        self._end()

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_lines(self, count: int) -> str:
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            text = _COLOR.sub("", file.read().decode("utf-8", "replace"))
        return " / ".join(line.strip() for line in [line for line in text.splitlines() if line.strip()][-count:])


def _without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name not in _OF_A_LAUNCHER and not name.startswith("TORCHELASTIC_")
    }


def _end(process: "subprocess.Popen[bytes]", log: Path, is_closing: threading.Event) -> None:
    is_closing.set()
    died_by_itself = process.poll() is not None
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    for insist in (process.terminate, process.kill):
        try:
            process.wait(_END_SECONDS)
            break
        except subprocess.TimeoutExpired:
            # A process that was forked from this one holds the pipe open. SIGKILL would end the keeper alone.
            insist()
    process.wait()
    if not died_by_itself:
        log.unlink(missing_ok=True)


def _watch(name: str, process: "subprocess.Popen[bytes]", log: Path, is_closing: threading.Event) -> None:
    status = process.wait()
    if not is_closing.is_set():
        warn(f"{name} ended with status {status} while it was needed; nothing can be answered any more -> see {log}")
