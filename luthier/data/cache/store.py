"""The cache of tokenized rows. An entry is stored under the hash of everything that its rows depend on.

An entry is a folder that is either complete or absent. If several processes need it, one makes it and the others wait
for the folder; no collective operation is involved.
"""

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import require_writable, save_folder_atomically
from luthier.core.log import info, warn
from luthier.core.paths import cache_root
from luthier.data.cache.eviction import SIZES_FILE, evict, limit_bytes, use

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
"""How long a process waits for another one to start making an entry before it makes the entry itself."""
ALONE = (
    "data: the first process of the run has not begun to make the rows in {folder} in a minute, so this machine makes"
    " its own -> set data_shared_file_system: false, or let all machines share the folder of LUTHIER_CACHE"
)


@dataclass(slots=True)
class Cache:
    """Entries in `folder` by key. `makes` is false for a process that waits for another one to make them."""

    folder: Path
    makes: bool = True
    overwrites: bool = False
    """Rebuild every entry, once."""
    _made: set[str] = field(default_factory=set)

    def entry(self, key: str | None, make: Callable[[Path], None]) -> Path:
        """The folder of `key`. If it does not exist, `make` fills an empty folder.

        Without a key the entry is for this process only. Raises what `make` raises, and `RunFailed` if the disk is
        full.
        """
        if key is None:
            return _temporary(make)
        folder, started, waits = self.folder / key, time.monotonic(), False
        while not (self.holds(key) and use(folder)):
            is_alone = not self.makes and time.monotonic() - started > PATIENCE_SECONDS
            if not self.makes and not waits:
                info(f"data: waiting for the first process of the run to make the rows in {folder}")
                waits = True
            if self.makes or is_alone:
                self._try(key, make, is_alone=is_alone)
            else:
                time.sleep(POLL_SECONDS)
        return folder

    def holds(self, key: str) -> bool:
        """Whether the entry exists and need not be rebuilt."""
        is_outdated = self.overwrites and self.makes and key not in self._made
        return not is_outdated and _is_whole(self.folder / key)

    def _try(self, key: str, make: Callable[[Path], None], *, is_alone: bool) -> None:
        """Make the entry, unless another process is making it. `is_alone`: it was the turn of another one."""
        try:
            with FileLock(self.folder / f"{key}.lock", timeout=POLL_SECONDS):
                if not self.holds(key):
                    if is_alone:
                        warn(ALONE.format(folder=self.folder))
                    self._make(key, make)
        except Timeout:
            return
        except NotImplementedError:  # a shared disk without locks; two processes would make the same entry
            self._make(key, make)

    def _make(self, key: str, make: Callable[[Path], None]) -> None:
        # Leftovers of a killed process; the lock ensures that no process is writing them.
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
    """Whether the entry exists and all its files still have their size."""
    try:
        sizes = json.loads((entry / SIZES_FILE).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def open_cache(*, overwrites: bool, makes: bool) -> Cache:
    """The user's cache of rows; if it is not writable, a temporary one that is deleted when the process ends."""
    folder = cache_root() / "rows"
    try:
        require_writable("LUTHIER_CACHE", folder)
    except OutputError as fault:
        warn(f"tokenized rows are not cached: {fault}")
        return Cache(_removed_at_exit())
    folder.mkdir(parents=True, exist_ok=True)
    limit_bytes()  # reports an invalid number before any work is done
    return Cache(folder, makes, overwrites)


def _temporary(make: Callable[[Path], None]) -> Path:
    folder = _removed_at_exit()
    make(folder)
    return folder


def _removed_at_exit() -> Path:
    """A temporary folder. It stays until the process ends, since worker processes open the files by name."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
