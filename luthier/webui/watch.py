"""The curves of a run, from trainer_log.jsonl as it grows, and the end of its console.log.

Only what is new is read. A line that is not complete yet is left for the next look.
"""

import contextlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from math import isfinite, nan
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from luthier.webui.runs import shown_json

MAX_POINTS = 2000
NOT_A_CURVE = frozenset({"current_steps", "total_steps", "percentage", "elapsed_time", "remaining_time"})
_COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINES_AT_ONCE = 1000
LONG_LOG_BYTES = 1 << 21
"""So much is read in 40 ms."""
SAMPLED_LINES = 1000
_MOST = 2**53
"""A whole number of this size or more is none that training logs, and may be too large for an array."""
_CONSOLE_BYTES = 64 * 1024
Point = tuple[int, float]


class _Numbers:
    """What the lines of a log say."""

    def __init__(self) -> None:
        # Arrays and not pairs: half a million pairs would keep the garbage collector busy.
        self.steps: dict[str, array[int]] = {}
        self.values: dict[str, array[float]] = {}
        self.last: dict[str, Any] = {}
        self.session: list[tuple[int, int]] = []
        """The first and the last (step, seconds) since the run was started or resumed."""
        self._elapsed: Any = None
        self._seconds: int | None = None

    def add(self, logs: Sequence[dict[str, Any]]) -> None:
        """Curve by curve and not step by step: a log of 100,000 steps has half a million numbers."""
        if not logs:
            return
        self.last = logs[-1]
        columns = _columns(logs)
        steps = columns["current_steps"]
        for name, numbers in columns.items():
            if name in NOT_A_CURVE:
                continue
            at: Sequence[int] = steps
            if not _are_numbers(numbers):
                points = [point for point in zip(steps, numbers, strict=True) if _is_number(point[1])]
                at, numbers = [step for step, _ in points], [number for _, number in points]
            if numbers and name not in self.values:
                self.steps[name], self.values[name] = array("q"), array("d")
            if numbers:
                self.steps[name].extend(at)
                self.values[name].extend(numbers)
        for step, elapsed in zip(steps, columns.get("elapsed_time", ()), strict=False):
            if elapsed != self._elapsed:
                self._elapsed, self._seconds = elapsed, seconds_of(elapsed)
            if self._seconds is not None:
                self._time(step, self._seconds)

    def _time(self, step: int, seconds: int) -> None:
        if not self.session or seconds < self.session[-1][1] or step < self.session[-1][0]:
            self.session = [(step, seconds)]  # the run was started or resumed here
        else:
            self.session[1:] = [(step, seconds)]


class Curves:
    """The numbers of one trainer_log.jsonl. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = 0
        """Grows with each change."""
        self.is_sample = False
        """Only some lines of a long log have been read (see `glance`)."""
        self._reading = Lock()
        """Held for as long as a file is read and parsed, which may take a second."""
        self._lock = Lock()
        """Held while numbers are added or taken, so that nobody who draws has to wait."""
        self._file, self._offset = (0, 0), 0
        self._numbers = _Numbers()
        self._drawn: dict[str, tuple[tuple[int, int], list[Point]]] = {}
        """Curve -> (version, limit) and its points. Many pages that show one run cost one thinning."""

    def glance(self) -> None:
        """Read what a page draws first: of a long log that is new here, lines at equal distances.

        All the lines of a log of 100,000 steps take half a second. The next `read` takes them, extremes included.
        """
        with self._reading:
            try:
                size = self.path.stat().st_size
                if self._offset or size < LONG_LOG_BYTES:
                    self._read()
                    return
                if self.is_sample:
                    return
                lines = _sampled(self.path, size)
            except OSError:
                return
            numbers = _Numbers()
            numbers.add(_steps_in(lines))
            self._replace(numbers, (0, 0), 0, is_sample=True)

    def read(self) -> bool:
        """Read what has been written since. Returns whether there was anything."""
        with self._reading:
            return self._read()

    def _read(self) -> bool:
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                # A resumed run writes the file again, up to its checkpoint.
                is_new = (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset
                start = 0 if is_new else self._offset
                file.seek(start)
                data = file.read()
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and not is_new:
            return False
        numbers = _Numbers() if is_new else self._numbers
        lines = whole.splitlines()
        for first in range(0, len(lines), _LINES_AT_ONCE):
            logs = _steps_in(lines[first : first + _LINES_AT_ONCE])
            with self._lock:
                numbers.add(logs)
        self._replace(numbers, (found.st_dev, found.st_ino), start + len(whole))
        return bool(whole)

    def _replace(self, numbers: _Numbers, file: tuple[int, int], offset: int, *, is_sample: bool = False) -> None:
        with self._lock:
            self._numbers, self._file, self._offset, self.is_sample = numbers, file, offset, is_sample
            self.version += 1

    @property
    def last(self) -> dict[str, Any]:
        return self._numbers.last

    @property
    def names(self) -> tuple[str, ...]:
        """The curves, those of losses first and those of one point last."""
        with self._lock:
            points = {name: len(values) for name, values in self._numbers.values.items()}
            return tuple(sorted(points, key=lambda name: (name != "loss", points[name] == 1, "loss" not in name, name)))

    def curve(self, name: str, limit: int = MAX_POINTS) -> list[Point]:
        """At most `limit` points of one curve."""
        with self._lock:
            if (found := self._drawn.get(name)) is None or found[0] != (self.version, limit):
                points = thinned(self._numbers.steps.get(name, ()), self._numbers.values.get(name, ()), limit)
                self._drawn[name] = found = (self.version, limit), points
            return found[1]

    def last_value(self, name: str) -> float | None:
        with self._lock:
            return self._numbers.values[name][-1] if name in self._numbers.values else None

    @property
    def steps_per_second(self) -> float | None:
        """Of the time since the run was started or resumed."""
        session = self._numbers.session
        if len(session) < 2:
            return None
        (first, began), (last, now) = session
        return (last - first) / (now - began) if now > began else None


def _sampled(path: Path, size: int) -> list[bytes]:
    """The first line, the last whole one, and lines at equal distances between them."""
    with path.open("rb") as file:
        lines = [file.readline()]
        for number in range(1, SAMPLED_LINES):
            file.seek(size * number // SAMPLED_LINES)
            file.readline()  # the rest of a line
            lines.append(file.readline())
        end = file.read()
    lines += end[: end.rfind(b"\n") + 1].splitlines(keepends=True)[-1:]
    return [line for line in dict.fromkeys(lines) if line.endswith(b"\n")]


def _steps_in(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    return [values for values in _parsed(lines) if _is_of_a_step(values)]


def _columns(logs: Sequence[dict[str, Any]]) -> dict[str, Sequence[Any]]:
    """The values of each name, NaN where a step has none. Most steps log the same names, which goes faster."""
    names = tuple(logs[0])
    if len(names) > 1 and {*map(len, logs)} == {len(names)}:
        with contextlib.suppress(KeyError):
            return dict(zip(names, zip(*map(itemgetter(*names), logs), strict=True), strict=True))
    return {name: [values.get(name, nan) for values in logs] for name in dict.fromkeys(chain.from_iterable(logs))}


def _is_of_a_step(values: Any) -> bool:
    step = values.get("current_steps") if isinstance(values, dict) else None
    return type(step) is int and abs(step) < _MOST


def _are_numbers(values: Sequence[Any]) -> bool:
    kinds = {*map(type, values)}
    if kinds == {int}:
        return min(values) > -_MOST and max(values) < _MOST
    return kinds == {float} and isfinite(sum(values))


def _is_number(value: Any) -> bool:
    return (type(value) is float and isfinite(value)) or (type(value) is int and abs(value) < _MOST)


def _parsed(lines: Sequence[bytes]) -> Iterator[Any]:
    """The values of lines of JSON. A killed process can leave half a line in the middle, which is left out."""
    whole = b"[" + b",".join(lines) + b"]"  # faster than one by one
    for load in (orjson.loads, shown_json):  # only the second one reads NaN
        with contextlib.suppress(ValueError, RecursionError):
            yield from load(whole)
            return
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            yield shown_json(line)


def thinned(steps: Sequence[int], values: Sequence[float], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: the first, the last, and the lowest and highest of each stretch between."""
    if len(steps) <= limit:
        return list(zip(steps, values, strict=True))
    num_inner, num_stretches = len(steps) - 2, (limit - 2) // 2
    kept = [0]
    for number in range(num_stretches):
        start = 1 + number * num_inner // num_stretches
        stretch = values[start : 1 + (number + 1) * num_inner // num_stretches]
        kept += sorted({start + stretch.index(min(stretch)), start + stretch.index(max(stretch))})
    return [(steps[index], values[index]) for index in (*kept, len(steps) - 1)]


def smoothed(points: Sequence[Point], weight: float) -> list[Point]:
    """An exponential moving average without the bias of its first values; `weight` 0 changes nothing, 0.99 much."""
    if weight == 0:
        return list(points)
    average = total = 0.0
    result = []
    for step, value in points:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append((step, average / total))
    return result


def seconds_of(text: Any) -> int | None:
    """`1 day, 2:03:04` -> 93784, as trainer_log.jsonl writes times; None for anything else."""
    if not isinstance(text, str):
        return None
    days, comma, time = text.rpartition(", ")
    try:
        hours, minutes, seconds = map(int, time.split(":"))
        whole = int(days.partition(" day")[0]) if comma else 0
    except ValueError:
        return None
    return ((whole * 24 + hours) * 60 + minutes) * 60 + seconds


def console_end(path: Path, max_lines: int = 400) -> str:
    """The last lines that a run printed, without colors; of a progress line only its last state."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _CONSOLE_BYTES)
            file.seek(start)
            data = file.read()
    except OSError:
        return ""
    text = _COLOR.sub("", data.decode("utf-8", "replace"))
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join((lines[1:] if start else lines)[-max_lines:])
