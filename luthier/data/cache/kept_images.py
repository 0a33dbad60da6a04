"""Images, videos and audio whose bytes stood in rows, of a table or as addresses of data: files in the cache under
their SHA-256.

`luthier.data.media.items.stored` writes them. The entry of a dataset lists its images, and counts with them when the
cache is full. A file goes when no entry lists it any more and nobody has used it for a week: a stream has no entry, and
that of a table is written after its images.
"""

import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from luthier.data.media.kinds import files_of

IMAGES_FILE = "images.json"
"""In the entry of a dataset: all its items of media."""
SPARED_SECONDS = 7 * 24 * 3600
_NAME = re.compile(r"[0-9a-f]{64}(\.\w+)?")


def folder_beside(entries: Path) -> Path:
    """Where the images are whose rows are in the folder `entries`."""
    return entries.with_name("media")


def listed_in(entry: Path, folder: Path) -> set[str]:
    """The names of the files in `folder` that an entry lists."""
    try:
        items = json.loads((entry / IMAGES_FILE).read_text(encoding="utf-8"))
        paths = [path for item in items for path in files_of(item)]
    except (OSError, ValueError):  # the entry is of another kind, or another process is removing it
        return set()
    start = f"{folder}{os.sep}"
    return {path.removeprefix(start) for path in paths if path.startswith(start)}


def num_bytes(names: Iterable[str], folder: Path) -> int:
    """Of those of the files that are there."""
    return sum(size for size, _ in map(_state, (folder / name for name in names)))


def remove_unlisted(folder: Path, entries: Iterable[Path]) -> int:
    """Remove the files that none of `entries` lists and nobody has used for a week. Returns their bytes."""
    try:
        names = {file.name for file in folder.iterdir() if _NAME.fullmatch(file.name)}
    except OSError:
        return 0
    for entry in entries if names else ():
        names -= listed_in(entry, folder)
    before, removed = time.time() - SPARED_SECONDS, 0
    for file in (folder / name for name in names):
        size, used = _state(file)
        if used < before:
            file.unlink(missing_ok=True)
            removed += size
    return removed


def _state(file: Path) -> tuple[int, float]:
    """(bytes, last use) of a file; (0, now) for one that is gone."""
    try:
        found = file.stat()
    except OSError:
        return 0, time.time()
    return found.st_size, max(found.st_atime, found.st_mtime)
