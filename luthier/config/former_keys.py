"""Keys of former versions of LLaMA-Factory: what a user writes today, from `keys/former.toml`."""

import re
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent / "keys" / "former.toml"
_QUOTED = re.compile(r"`(\w+)`")


@cache
def table() -> Mapping[str, str]:
    """Former key, perhaps with `*` -> remedy."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def remedy_of(name: str) -> str:
    """What to write instead of a former key; empty if `name` is none."""
    return next((remedy for former, remedy in table().items() if fnmatchcase(name, former)), "")


def named_in(remedy: str) -> tuple[str, ...]:
    """The names in backquotes."""
    return tuple(_QUOTED.findall(remedy))
