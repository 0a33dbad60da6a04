"""The cache of tokenized rows: torn, full or not writable, it never changes or stops a run that could do without."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(person, monkeypatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(person.folder / "cache"))
    return person.folder / "cache" / "rows"


@pytest.mark.parametrize("name", ["rows.arrow", "account.json", "sizes.json"])
def test_a_torn_entry_is_rebuilt(person, cache, name):
    path = person.run_file()
    said = person.types("data", path)
    assert said.status == 0
    (file,) = cache.glob(f"*/{name}")
    for spoil in (lambda: file.write_bytes(file.read_bytes()[:-20]), file.unlink):
        spoil()
        assert person.types("data", path) == said


def test_a_full_disk(person, small_disk, monkeypatch):
    disk = small_disk(12)
    monkeypatch.setenv("LUTHIER_CACHE", str(disk))
    said = person.types("train", person.run_file(dataset="numbers,tools")).complaint(1)
    assert f"{disk}/rows/" in said
    assert "choose another folder with the environment variable LUTHIER_CACHE" in said
    assert not [path for path in disk.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="this system has no folder that nobody can write to")
def test_a_folder_that_cannot_be_written(person, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", "/proc/luthier")
    outcome = person.types("data", person.run_file())
    assert outcome.status == 0
    assert "warning: tokenized rows are not cached: LUTHIER_CACHE: /proc/luthier" in outcome.err
