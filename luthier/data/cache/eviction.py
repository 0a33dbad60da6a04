"""Eviction: the least recently used entries are removed when the cache is too big.

A process that uses an entry holds a shared lock on its list of files until the process ends, so an entry in use is
never removed, whichever process uses it. On a disk without such locks nothing is removed.
"""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from luthier.core.drafts import draft_name
from luthier.core.errors import InvalidInput
from luthier.core.log import info
from luthier.data.cache.kept_images import folder_beside, listed_in, num_bytes, remove_unlisted

SIZES_FILE = "sizes.json"
"""Name -> bytes of the other files of an entry. Its time stamp is the last use of the entry."""
DEFAULT_GB = 20.0

_in_use: dict[Path, int] = {}
"""Entry -> the open file that holds its lock, until the process ends."""


def limit_bytes() -> int:
    """`LUTHIER_CACHE_GB` in bytes. Raises `InvalidInput` if it is not a number."""
    text = os.environ.get("LUTHIER_CACHE_GB") or str(DEFAULT_GB)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise InvalidInput(f"LUTHIER_CACHE_GB: {text}: is not a number of gigabytes -> e.g. LUTHIER_CACHE_GB=20")
    return int(number * 1e9)


def use(entry: Path) -> bool:
    """Protect an entry from removal while this process runs. False if it has just been removed.

    An entry that was made again since this process used it last has another list of files, and that one is locked.
    """
    if entry in _in_use:
        if _is_list_of(entry, _in_use[entry]):
            return True
        os.close(_in_use.pop(entry))
    try:
        descriptor = os.open(entry / SIZES_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:  # a disk without locks
        os.close(descriptor)
        return entry.is_dir()
    with suppress(OSError):  # it is gone, belongs to another user, or is on a read-only disk
        os.utime(entry / SIZES_FILE)
    is_same = _is_list_of(entry, descriptor)
    if is_same:
        _in_use[entry] = descriptor
    else:
        os.close(descriptor)
    return is_same


def _is_list_of(entry: Path, descriptor: int) -> bool:
    """Whether an open file is the list of files that the entry has now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(entry / SIZES_FILE))
    except FileNotFoundError:
        return False


def evict(folder: Path, most_bytes: int) -> None:
    """Remove the least recently used entries until the rest take `most_bytes`, or all that are left are in use.

    The images that only they list go with them.
    """
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    removed, left = 0, [entry for *_, entry in entries]
    for _, size, entry in entries:
        if total - removed <= most_bytes:
            break
        if entry not in _in_use and _remove(entry):
            removed += size
            left.remove(entry)
    strays = remove_unlisted(folder_beside(folder), left)
    if strays:
        info(f"cache: removed {strays / 1e9:.1f} GB of images that no cached dataset lists")
    if removed:
        what = f"removed {removed / 1e9:.1f} GB of the least recently used tokenized rows"
        info(f"cache: {what} (LUTHIER_CACHE_GB is the limit)")


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, entry) of each, with the images that it lists."""
    found, images = [], folder_beside(folder)
    for sizes in folder.glob(f"[!.]*/{SIZES_FILE}"):
        try:
            size = sum(file.stat().st_size for file in sizes.parent.iterdir())
            size += num_bytes(listed_in(sizes.parent, images), images)
            found.append((sizes.stat().st_mtime, size, sizes.parent))
        except OSError:  # another process is removing it
            continue
    return found


def _remove(entry: Path) -> bool:
    """False if some process uses it."""
    try:
        descriptor = os.open(entry / SIZES_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # If the process is killed now, the leftover is removed when the entry is made the next time.
        tombstone = entry.with_name(draft_name(entry.name))
        entry.rename(tombstone)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(tombstone, ignore_errors=True)
    return True
