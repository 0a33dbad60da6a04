"""A disk that loses power: what is left is what was flushed, as far as the standard goes.

fsync of a file keeps its content, fsync of a folder keeps which names it has. Everything else may or may not reach the
disk. The two extremes are made here; Linux file systems are somewhere between them.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """What is safe below a folder. All that is there at first is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contents: dict[int, bytes] = {}
        """Number of a file -> its bytes, and of a folder -> the numbers that its names stand for."""
        self._names: dict[int, dict[str, int]] = {}
        self._open: list[int] = []
        """Files that are open keep their number, also if they are removed."""
        for path in (folder, *folder.rglob("*")):
            number = os.open(path, os.O_RDONLY)
            self.flush(number)
            os.close(number)

    def flush(self, number: int) -> None:
        self._open.append(os.dup(number))
        state, path = os.fstat(number), Path(os.readlink(f"/proc/self/fd/{number}"))
        if stat.S_ISDIR(state.st_mode):
            self._names[state.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._contents[state.st_ino] = path.read_bytes()

    def close(self) -> None:
        for number in self._open:
            os.close(number)

    def write_flushed(self, target: Path) -> Path:
        """The folder if nothing but what was flushed has reached the disk."""
        self._write(self.folder.stat().st_ino, target)
        return target

    def _write(self, number: int, target: Path) -> None:
        if number in self._contents:
            target.write_bytes(self._contents[number])
            return
        target.mkdir()
        for name, inner in self._names.get(number, {}).items():
            self._write(inner, target / name)

    def write_names(self, target: Path) -> Path:
        """The folder if all names have reached the disk, and of the contents those that were flushed."""
        target.mkdir()
        for path in sorted(self.folder.rglob("*")):
            copy, state = target / path.relative_to(self.folder), path.stat()
            if path.is_dir():
                copy.mkdir()
            else:
                copy.write_bytes(self._contents.get(state.st_ino, bytes(state.st_size)))
        return target


@contextmanager
def recorded(folder: Path) -> Iterator[Disk]:
    """Records what is flushed below `folder` while the context is open."""
    disk, fsync = Disk(folder), os.fsync

    def flush(number: int) -> None:
        fsync(number)
        disk.flush(number)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", flush)
        try:
            yield disk
        finally:
            disk.close()
