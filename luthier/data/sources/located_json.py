"""Reads a JSON object with the line of each key, and finds repeated keys.

`json.loads` silently keeps the last of two equal keys and drops all positions, so errors could not be reported with
their line. Only objects are parsed here; every other value goes to `json`.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LocatedJson:
    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    """Path of keys -> 1-based line."""
    repeated: tuple[tuple[Path, int], ...] = ()
    """Path and line of every repeated key of an object; the first value is kept."""


def read_located(text: str) -> LocatedJson:
    """Parse a whole JSON text. Raises `json.JSONDecodeError`, whose position is exact."""
    walk = _Walk(text)
    value, end = walk.value(_skip(text, 0), ())
    if _skip(text, end) != len(text):
        raise json.JSONDecodeError("text after the end of the JSON value", text, _skip(text, end))
    return LocatedJson(value, walk.lines, tuple(walk.repeated))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


class _Walk:
    """The state of the parser. Positions only grow, so lines are counted once, from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines: dict[Path, int] = {}
        self.repeated: list[tuple[Path, int]] = []
        self._counted, self._line = 0, 1

    def line_at(self, position: int) -> int:
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def value(self, position: int, path: Path) -> tuple[Any, int]:
        if self.text.startswith("{", position):
            return self.object(position, path)
        return _DECODER.raw_decode(self.text, position)

    def object(self, position: int, path: Path) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        position = _skip(self.text, position + 1)
        if self.text.startswith("}", position):
            return found, position + 1
        while True:
            key, after = self.key(position)
            here, line = (*path, key), self.line_at(position)
            value, after = self.value(_skip(self.text, after), here if key not in found else (*here, "repeated"))
            if key in found:
                self.repeated.append((here, line))
            else:
                found[key], self.lines[here] = value, line
            position = _skip(self.text, after)
            if self.text.startswith("}", position):
                return found, position + 1
            position = _skip(self.text, self.expect(",", position))

    def key(self, position: int) -> tuple[str, int]:
        if not self.text.startswith('"', position):
            raise json.JSONDecodeError("a key in double quotes is expected", self.text, position)
        key, after = _DECODER.raw_decode(self.text, position)
        return key, self.expect(":", _skip(self.text, after))

    def expect(self, mark: str, position: int) -> int:
        if not self.text.startswith(mark, position):
            raise json.JSONDecodeError(f"{mark!r} is expected", self.text, position)
        return position + 1
