"""Paths as users write them."""

import os


def absent_remedy(path: str, remedy: str) -> str:
    """What to do about a path that does not exist: `remedy`, or to write it for this system if it is one of Windows."""
    if os.sep == "/" and "\\" in path:
        return f"write it as {path.replace(chr(92), '/')}: a backslash separates folders on Windows only"
    return remedy
