"""Paths as users write them, and the folder of the cache."""

import os
from functools import lru_cache
from pathlib import Path


def cache_root() -> Path:
    """`LUTHIER_CACHE`, or the folder `luthier` in the user's cache folder."""
    own = os.environ.get("LUTHIER_CACHE")
    if own:
        return _path(own).expanduser()
    return _path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "luthier"


@lru_cache(maxsize=4)
def _path(text: str) -> Path:
    """Cached, since every file of media asks for it."""
    return Path(text)


def absent_remedy(path: str, remedy: str) -> str:
    """What to do about a path that does not exist: `remedy`, or to write it for this system if it is one of Windows."""
    return windows_remedy(path) or remedy


def windows_remedy(path: str) -> str:
    """How to write a path of Windows for this system; empty if it is none, or if there is a file of this name."""
    if os.sep != "/" or "\\" not in path or os.path.exists(path):
        return ""
    return f"write it as {path.replace(chr(92), '/')}: a backslash separates folders on Windows only"
