"""A full cache: the entry unused for longest is removed, one in use never."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from luthier.data.cache.store import Cache


def entry_of(size: int):
    return lambda folder: folder.joinpath("rows.arrow").write_bytes(bytes(size))


def in_another_process(folder: Path, key: str, size: int) -> None:
    """Makes or uses an entry in a process that ends."""
    code = (
        "from pathlib import Path; from luthier.data.cache.store import Cache\n"
        f"Cache(Path({str(folder)!r})).entry({key!r}, lambda f: f.joinpath('rows.arrow').write_bytes(bytes({size})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_not_used_for_longest_goes_when_the_cache_is_full(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE_GB", "0.000025")  # 25,000 bytes
    for number, key in enumerate(("first", "second", "third")):
        in_another_process(tmp_path, key, 8000)
        os.utime(tmp_path / key / "sizes.json", (1000 + number, 1000 + number))
    in_another_process(tmp_path, "first", 0)  # is there, so it is only used
    in_another_process(tmp_path, "fourth", 8000)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"first", "third", "fourth"}


def test_what_some_process_uses_is_never_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE_GB", "0")
    own = Cache(tmp_path).entry("own", entry_of(8000))
    in_another_process(tmp_path, "other", 8000)
    assert (own / "rows.arrow").stat().st_size == 8000
    Cache(tmp_path).entry("last", entry_of(10))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"own", "last"}


def test_an_entry_of_another_user_is_protected_too(tmp_path, monkeypatch):
    """Its time of use is not this user's to change."""
    in_another_process(tmp_path, "theirs", 8000)

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("luthier.data.cache.eviction.os.utime", refuse)
    theirs = Cache(tmp_path).entry("theirs", entry_of(8000))
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_CACHE_GB", "0")
    in_another_process(tmp_path, "other", 10)
    assert (theirs / "rows.arrow").is_file()


def test_an_entry_that_this_process_made_twice_is_still_protected(tmp_path, monkeypatch):
    for _ in range(2):  # two runs with overwrite_cache: true
        own = Cache(tmp_path, overwrites=True).entry("twice", entry_of(8000))
    monkeypatch.setenv("LUTHIER_CACHE_GB", "0")
    in_another_process(tmp_path, "other", 8000)
    assert (own / "rows.arrow").stat().st_size == 8000


def test_an_entry_that_goes_before_it_is_used_is_made_again(tmp_path, monkeypatch):
    in_another_process(tmp_path, "mine", 10)
    monkeypatch.setattr(
        "luthier.data.cache.store.use", lambda entry, tries=[]: tries.append(entry) or _vanish(entry, tries)
    )
    assert (Cache(tmp_path).entry("mine", entry_of(20)) / "rows.arrow").stat().st_size == 20


def _vanish(entry: Path, tries: list[Path]) -> bool:
    """The first try comes too late."""
    if len(tries) == 1:
        shutil.rmtree(entry)
    return len(tries) > 1
