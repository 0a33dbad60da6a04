"""Tokenized rows under the hash of all that made them: the same input is tokenized once, a changed one is never reused.

An entry is a folder that is whole or not there. Of several processes that need it one makes it, and the others wait for
the folder: no collective operation waits meanwhile.
"""

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import require_writable, save_folder_atomically
from luthier.core.log import warn
from luthier.data.cache.eviction import SIZES_FILE, evict, limit_bytes, use

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
"""So long a process leaves an entry to the one that should make it, unless that one has it in work."""


def cache_root() -> Path:
    """`LUTHIER_CACHE`, or the folder `luthier` where the user's caches are."""
    own = os.environ.get("LUTHIER_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "luthier"


@dataclass(slots=True)
class Cache:
    """Entries in `folder` by key. `makes` is false for a process that leaves making them to another one."""

    folder: Path
    makes: bool = True
    overwrites: bool = False
    """Make every entry anew, once."""
    _made: set[str] = field(default_factory=set)

    def entry(self, key: str | None, make: Callable[[Path], None]) -> Path:
        """The folder of `key`, made by `make` (which is given an empty folder to write into) if it is not there yet.

        Without a key it is made for this process only. Raises what `make` raises, and `RunFailed` if the disk is full.
        """
        if key is None:
            return _temporary(make)
        folder, started = self.folder / key, time.monotonic()
        while not (self.holds(key) and use(folder)):
            if self.makes or time.monotonic() - started > PATIENCE_SECONDS:
                self._try(key, make)
            else:
                time.sleep(POLL_SECONDS)
        return folder

    def holds(self, key: str) -> bool:
        """Whether the entry is there, and need not be made anew."""
        wanted_anew = self.overwrites and self.makes and key not in self._made
        return not wanted_anew and _is_whole(self.folder / key)

    def _try(self, key: str, make: Callable[[Path], None]) -> None:
        """Make the entry, unless another process has it in work."""
        try:
            with FileLock(self.folder / f"{key}.lock", timeout=POLL_SECONDS):
                if not self.holds(key):
                    self._make(key, make)
        except Timeout:
            return
        except NotImplementedError:  # a shared disk without locks; what two processes make at once is the same
            self._make(key, make)

    def _make(self, key: str, make: Callable[[Path], None]) -> None:
        # What a killed process has left; the lock says that none is at work.
        for leftover in (*self.folder.glob(f".{key}.*.tmp"), *(self.folder / key).glob(".*.tmp")):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with save_folder_atomically(self.folder / key) as draft:
                make(draft)
                sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
                (draft / SIZES_FILE).write_text(json.dumps(sizes), encoding="utf-8")
        except RunFailed as fault:
            raise RunFailed(f"{fault} with the environment variable LUTHIER_CACHE") from fault
        self._made.add(key)
        use(self.folder / key)
        evict(self.folder, limit_bytes())


def _is_whole(entry: Path) -> bool:
    """The entry is there, and nobody has cut off or taken away one of its files since it was made."""
    try:
        sizes = json.loads((entry / SIZES_FILE).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def open_cache(*, overwrites: bool, makes: bool) -> Cache:
    """The user's cache of rows; where it cannot be written, one that is gone when the process ends."""
    folder = cache_root() / "rows"
    try:
        require_writable("LUTHIER_CACHE", folder)
    except OutputError as fault:
        warn(f"tokenized rows are not kept: {fault}")
        return Cache(_removed_at_exit())
    folder.mkdir(parents=True, exist_ok=True)
    limit_bytes()  # a wrong number is told before work is done
    return Cache(folder, makes, overwrites)


def _temporary(make: Callable[[Path], None]) -> Path:
    folder = _removed_at_exit()
    make(folder)
    return folder


def _removed_at_exit() -> Path:
    """Worker processes may open the files by name, so they stay until the end."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
