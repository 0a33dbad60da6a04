"""Keys of other versions of LLaMA-Factory and of other programs: what to write instead, from tables in `keys`."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

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


def other_key(name: str) -> OtherKey | None:
    """What is known about a key that no run file of this version has; None if nobody else has it either."""
    return next((key for pattern, key in table().items() if fnmatchcase(name, pattern)), None)
