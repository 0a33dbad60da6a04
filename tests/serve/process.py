"""`luthier api` as a process of its own."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

READY_SECONDS = 180


HELD = """
import sys, time
from pathlib import Path
from luthier.cli import main
from luthier.serve import loading

def held(*words, load=loading.load_model):
    while not Path(sys.argv[2]).with_name("load").exists():
        time.sleep(0.01)
    return load(*words)

loading.load_model = held
sys.exit(main(sys.argv[1:]))
"""
"""`luthier`, which loads no model before a file `load` is beside its run file."""


class Api:
    def __init__(
        self, folder: Path, keys: Mapping[str, Any], *, program: Sequence[str] = ("-m", "luthier"), **environ: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        run_file = folder / "run.yaml"
        run_file.write_text(yaml.safe_dump(dict(keys)), "utf-8")
        self.errors = folder / "stderr.txt"
        variables = {**os.environ, "API_HOST": "127.0.0.1", "API_PORT": "0", **environ}
        self.process = subprocess.Popen(
            [sys.executable, *program, "api", str(run_file)],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            env=variables,
            text=True,
        )

    def wait_until_ready(self) -> str:
        """The address, e.g. `http://127.0.0.1:43210`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:") and line.endswith("/v1\n"), self.errors.read_text("utf-8")
        return line.removeprefix("ready: ").removesuffix("/v1\n")

    def stop(self, number: int = 15) -> int:
        """Send a signal and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=READY_SECONDS)


@contextlib.contextmanager
def api(folder: Path, keys: Mapping[str, Any], **environ: str) -> Iterator[tuple[str, Api]]:
    """(its address, the process) of a server that is ready."""
    started = Api(folder, keys, **environ)
    try:
        yield started.wait_until_ready(), started
    finally:
        started.process.kill()
        started.process.wait()


@contextlib.contextmanager
def leaving(url: str, body: Mapping[str, Any]) -> Iterator[None]:
    """A client that posts `body` and is gone at the end of the block, whatever was answered by then."""
    address, data = urlsplit(url), json.dumps(dict(body))
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    connection.request("POST", address.path, data, {"content-type": "application/json"})
    try:
        yield
    finally:
        connection.close()


def wait_for_port(port: int, seconds: float = READY_SECONDS) -> None:
    """Until something listens there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError("nothing listens")
