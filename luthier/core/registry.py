"""A registry is a folder: the file name is the name that users write, and the file is the implementation.

Listing names reads the directory and imports nothing; `get` imports one file. So a new variant is one new file,
`--help` stays fast, and no import registers anything as a side effect.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core.errors import UnknownVariant

PACKAGE_ROOT = Path(__file__).parent.parent


MAX_SUGGESTIONS = 3
MIN_LIKENESS = 0.6
"""Of a suggestion. `warmup` is like `warmup_steps` by 0.67; the same word is like itself by 1."""
MAX_GAP = 0.1
"""How much less like than the best a further suggestion may be."""


def nearest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Up to three known names that may be meant by `name`, best first. Upper and lower case do not count.

    `chatlm` gives `chatml`, with two letters swapped, and `chatglm3`, which is almost as near.
    """
    written = name.lower()
    found = []
    for word in dict.fromkeys(known):
        candidate = word.lower()
        if _can_be_like(written, candidate) and (likeness := _likeness(written, candidate)) >= MIN_LIKENESS:
            found.append((-likeness, word))
    found.sort()
    return tuple(word for unlike, word in found[:MAX_SUGGESTIONS] if unlike <= found[0][0] + MAX_GAP)


def did_you_mean(name: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """`did you mean X, Y or Z?`, or nothing if no known name is near. `spell` says how a name is written there."""
    return question([spell(word) for word in nearest(name, known)])


def question(names: Sequence[str]) -> str:
    """The words of `did_you_mean`, for names that are known already."""
    if not names:
        return ""
    *others, last = names
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def _can_be_like(a: str, b: str) -> bool:
    """An upper bound of the likeness, from letters alone, is high enough; it spares the work on most names."""
    letters = sum(min(a.count(letter), b.count(letter)) for letter in set(a))
    return 2 * letters >= MIN_LIKENESS * (len(a) + len(b))


def _likeness(a: str, b: str) -> float:
    """1 - distance / (letters of both), by optimal string alignment.

    A letter added or left out costs 1, two neighbours swapped cost 1, and another letter costs 2, so that two names
    without a common letter have the likeness 0.
    """
    if not a and not b:
        return 1.0
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (0 if a[i - 1] == b[j - 1] else 2))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return 1 - last[-1] / (len(a) + len(b))


class Registry:
    """Variants of one kind, e.g. ``Registry("stage", "luthier.stages", "STAGE")``."""

    def __init__(self, key: str, package: str, symbol: str) -> None:
        self.key, self.package, self.symbol = key, package, symbol

    @cached_property
    def names(self) -> tuple[str, ...]:
        folder = PACKAGE_ROOT.joinpath(*self.package.split(".")[1:])
        return tuple(sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")))

    def get(self, name: str) -> Any:
        """The variant called `name`. Raises `UnknownVariant` with the nearest known names."""
        if name not in self.names:
            hint = did_you_mean(name, self.names, repr)
            hint = f"; {hint}" if hint else ""
            raise UnknownVariant(f"{self.key}: unknown value {name!r}{hint} (one of {', '.join(self.names)})")
        return getattr(importlib.import_module(f"{self.package}.{name}"), self.symbol)
