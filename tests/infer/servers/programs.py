"""Programs called vllm and sglang on PATH: stand-ins, and ones that fail."""

import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.infer.servers import stand_in

ROOT = Path(stand_in.__file__).parents[3]


class Installed:
    """A program on PATH, and the folder where the stand-in leaves what it was asked."""

    def __init__(self, folder: Path, name: str, script: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        binaries = folder / "bin"
        binaries.mkdir()
        program = binaries / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.environ = {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN_FOLDER": str(folder),
            "PYTHONPATH": str(ROOT),
        }

    @property
    def argv(self) -> list[str]:
        return json.loads((self.folder / "argv.json").read_text())

    @property
    def calls(self) -> list[dict[str, Any]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def num_requests(self) -> int:
        return sum("body" in call for call in self.calls)

    @property
    def num_gone(self) -> int:
        return sum("gone" in call for call in self.calls)

    @property
    def last_body(self) -> dict[str, Any]:
        return [call["body"] for call in self.calls if "body" in call][-1]

    @contextlib.contextmanager
    def holding(self, num_tokens: int = 24) -> Iterator[None]:
        """No answer goes on after so many tokens."""
        draft, file = self.folder / "hold.draft", self.folder / "hold"
        draft.write_text(str(num_tokens))
        draft.rename(file)
        try:
            yield
        finally:
            file.unlink()


def stand_in_for(name: str, folder: Path) -> Installed:
    return Installed(folder, name, f'exec "{sys.executable}" "{stand_in.__file__}" {name} "$@"')


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_with(word: str) -> list[int]:
    """The processes whose command or environment holds a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if word.encode() in text and is_running(int(entry.name)):
                    found.append(int(entry.name))
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
