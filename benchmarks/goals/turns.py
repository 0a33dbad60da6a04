"""Programs that take their steps in turn: the first steps of all, the second steps of all, and so on.

A machine's speed changes with its temperature and with other work on it. Steps that follow each other see the same
machine, so ratios are taken step by step. Each program is a process of its own with its own peak memory; the others
sleep while it computes. The parent imports nothing large, since Linux counts its memory in the peak of a child.
"""

import json
import os
import socket
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.goals.clock import SOCKET

ROOT = Path(__file__).resolve().parents[2]
LONGEST_TURN_SECONDS = 600
NUM_LINES_SHOWN = 12


class ProgramFailed(Exception):
    """A measured program ended with an error."""


@dataclass(slots=True)
class Measured:
    """What one program did."""

    seconds: list[float] = field(default_factory=list)
    """Of each turn after the first, which warms up."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all threads in these turns: what other work on the machine changes less."""
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median, smallest and largest of the ratios of the steps."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> "Ratio":
        ratios = [one / other for one, other in zip(slow, fast, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


class Program:
    """A child process and the socket to it."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name, self.measured = name, Measured()
        mine, its = socket.socketpair()
        mine.settimeout(LONGEST_TURN_SECONDS)
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed by `close`
        with its:
            self._process = subprocess.Popen(
                [*command],
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT), SOCKET: str(its.fileno())},
                pass_fds=[its.fileno()],
                stdout=self._log,
                stderr=self._log,
            )
        self._socket, self._stream = mine, mine.makefile("rw")
        self.is_finished = False

    def turn(self, *, counts: bool) -> None:
        self._stream.write("go\n")
        self._stream.flush()
        took = self._hear()
        if counts:
            self.measured.seconds.append(took["seconds"])
            self.measured.cpu_seconds.append(took["cpu_seconds"])
        self.until_ready()

    def close(self) -> None:
        if self._process.poll() is None and not self.is_finished:
            self._process.kill()
        self._process.wait()
        self._stream.close()
        self._socket.close()
        self._log.close()

    def until_ready(self) -> None:
        """Wait until the program waits for its turn, or has finished."""
        message = self._hear()
        if "finished" in message:
            facts = message["finished"]
            self.is_finished = True
            self.measured.losses, self.measured.peak_bytes = facts.pop("losses"), facts.pop("peak_bytes")
            self.measured.facts = facts

    def _hear(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except TimeoutError:
            line = ""
            self._process.kill()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        raise ProgramFailed(
            f"{self.name} ended with status {status} before its work was done:\n" + "\n".join(lines[-NUM_LINES_SHOWN:])
        )


def take_turns(
    commands: Mapping[str, Sequence[str]],
    environments: Mapping[str, Mapping[str, str]] | None = None,
    *,
    starts_together: bool = False,
) -> dict[str, Measured]:
    """Name -> what the program of this command did. All must take the same number of turns.

    `environments`: by name, what is added to the environment of this process. `starts_together`: the programs
    import and load at the same time, for those that time nothing meanwhile. Raises `ProgramFailed`.
    """
    with ExitStack() as stack:
        programs = []
        for name, command in commands.items():
            programs.append(Program(name, command, (environments or {}).get(name, {})))
            stack.callback(programs[-1].close)
            if not starts_together:
                programs[-1].until_ready()
        for program in programs if starts_together else ():
            program.until_ready()
        number = 0
        while any(not program.is_finished for program in programs):
            for program in programs:
                if program.is_finished:
                    raise ProgramFailed(f"{program.name} took fewer turns than the others")
                program.turn(counts=number > 0)
            number += 1
        return {program.name: program.measured for program in programs}
