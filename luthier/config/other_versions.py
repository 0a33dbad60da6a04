"""Keys of other versions of LLaMA-Factory and of other programs: what to write instead, from tables in `keys`."""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

_KEYS = Path(__file__).parent / "keys"
_TABLES = {
    "former.toml": "key of a former version",
    "v1.toml": "key of v1 of LLaMA-Factory",
    "others.toml": "key of another program",
}
"""File -> who has its keys."""
_QUOTED = re.compile(r"`(\w+)`")


@dataclass(frozen=True, slots=True)
class OtherKey:
    """`reason` says who has the key."""

    reason: str
    remedy: str

    def remedy_for(self, name: str, value: Any, knows: Callable[[str], bool]) -> str:
        """The remedy for the key `name`; of a mapping whose members are known, with the lines to write. `knows`:
        whether a key is one of today."""
        written = None if value is None else lines_of(name, value, knows)
        return self.remedy if not written else f"write {'; '.join(written)}"

    @property
    def named(self) -> tuple[str, ...]:
        """The keys that the remedy names."""
        return tuple(_QUOTED.findall(self.remedy))


@cache
def table() -> Mapping[str, OtherKey]:
    """Key of another version or program, perhaps with `*` -> what to write instead."""
    return {
        name: OtherKey(reason, remedy)
        for file, reason in _TABLES.items()
        for name, remedy in tomllib.loads((_KEYS / file).read_text(encoding="utf-8")).items()
    }


def lines_of(name: str, value: Any, knows: Callable[[str], bool]) -> list[str] | None:
    """What to write for the mapping `value` of the key `name`; None if some of it has no key of today."""
    table = members().get(name)
    if table is None or not isinstance(value, Mapping):
        return None
    found = []
    for member, one in value.items():
        if one is None:
            continue
        line = table.get(f"{member}: {one}")
        key = table.get(member, member if knows(member) else None)
        if line is None and key is None:
            return None
        if line is None and key:
            names = key.strip("[]").split(", ")
            numbers = one if key.startswith("[") and isinstance(one, list | tuple) else [one]
            if len(names) != len(numbers):
                return None
            line = "; ".join(f"{key}: {_as_yaml(number)}" for key, number in zip(names, numbers, strict=True))
        found += [line] if line else []
    return found


def _as_yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def members() -> Mapping[str, Mapping[str, str]]:
    """Key of v1 that holds a mapping -> its members, perhaps with a value -> what to write instead."""
    return tomllib.loads((_KEYS / "v1_members.toml").read_text(encoding="utf-8"))


def other_key(name: str) -> OtherKey | None:
    """What is known about a key that no run file of this version has; None if nobody else has it either."""
    return next((key for pattern, key in table().items() if fnmatchcase(name, pattern)), None)
