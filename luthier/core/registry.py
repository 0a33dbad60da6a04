"""A registry is a folder: the file name is the name that users write, and the file is the implementation.

Listing names reads the directory and imports nothing; `get` imports one file. So a new variant is one new file,
`--help` stays fast, and no import registers anything as a side effect.
"""

import importlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core.errors import UnknownVariant

PACKAGE_ROOT = Path(__file__).parent.parent


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, if one is near enough to be meant; capitals do not count."""
    from difflib import get_close_matches  # only wanted when something is wrong

    in_small = {word.lower(): word for word in known}
    close = get_close_matches(name.lower(), list(in_small), n=1, cutoff=0.6)
    return in_small[close[0]] if close else None


class Registry:
    """Variants of one kind, e.g. ``Registry("stage", "luthier.stages", "STAGE")``."""

    def __init__(self, key: str, package: str, symbol: str) -> None:
        self.key, self.package, self.symbol = key, package, symbol

    @cached_property
    def names(self) -> tuple[str, ...]:
        folder = PACKAGE_ROOT.joinpath(*self.package.split(".")[1:])
        return tuple(sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")))

    def get(self, name: str) -> Any:
        """The variant called `name`. Raises `UnknownVariant` with the nearest known name."""
        if name not in self.names:
            close = nearest(name, self.names)
            hint = f"; did you mean {close!r}?" if close else ""
            raise UnknownVariant(f"{self.key}: unknown value {name!r}{hint} (one of {', '.join(self.names)})")
        return getattr(importlib.import_module(f"{self.package}.{name}"), self.symbol)
