"""Saving is all or nothing."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import save_folder_atomically, write_atomically
from tests.killing import watching


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with save_folder_atomically(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert listing(target) == ["a", "sub"]
    assert listing(target.parent) == ["out"]


@pytest.mark.parametrize("fault", [full_disk(), KeyboardInterrupt(), ValueError("our own fault")])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, fault):
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    expected = RunFailed if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected) as caught, save_folder_atomically(target, replaces=["*"]) as folder:
        (folder / "model.safetensors").write_text("half")
        raise fault
    assert listing(tmp_path) == ["out"]
    assert (target / "model.safetensors").read_text() == "old"
    if expected is RunFailed:
        assert "No space left" in str(caught.value)
        assert "kept" in str(caught.value)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path):
    saving = save_folder_atomically(tmp_path / "out", needed_bytes=10**18)
    with pytest.raises(RunFailed, match="it needs 1,000,000,000"), saving:
        pytest.fail("nothing is to be written")
    assert listing(tmp_path) == []


def test_files_of_an_earlier_save_do_not_stay_behind(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "notes.txt"):
        (target / name).write_text("old")
    with save_folder_atomically(target, replaces=["model*.safetensors"]) as folder:
        (folder / "model.safetensors").write_text("new")
    assert listing(target) == ["model.safetensors", "notes.txt"]


def test_what_describes_the_old_files_never_stands_beside_new_ones(tmp_path):
    """Killed before each change: either all is old, or no description is left."""
    for kill_at in count():
        target = tmp_path / str(kill_at)
        target.mkdir()
        old = dict.fromkeys(("a.safetensors", "b.safetensors", "manifest.json", "train_results.json"), "old")
        for name, content in old.items():
            (target / name).write_text(content)
        patterns = {"replaces": ["*.safetensors"], "outdates": ["manifest.json", "*_results.json"]}
        with watching(target, kill_at) as changes, save_folder_atomically(target, **patterns) as folder:
            for name in ("a.safetensors", "b.safetensors"):
                (folder / name).write_text("new")
        found = {path.name: path.read_text() for path in target.iterdir() if path.is_file()}
        assert "new" not in found.values() or ("manifest.json" not in found and "train_results.json" not in found)
        if len(changes) < kill_at:
            break
    assert found == {"a.safetensors": "new", "b.safetensors": "new"}


def test_a_place_where_no_folder_can_be_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another"), save_folder_atomically(tmp_path / "file" / "out"):
        pytest.fail("there is no such folder")


def test_threads_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    texts = [f"{number}\n" * 999 for number in range(4)]

    def write(text):
        for _ in range(50):
            write_atomically(tmp_path / "stop.json", text)

    with ThreadPoolExecutor(len(texts)) as threads:
        list(threads.map(write, texts))
    assert (tmp_path / "stop.json").read_text() in texts and listing(tmp_path) == ["stop.json"]


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert listing(path.parent) == ["file.json"]
    with pytest.raises(OutputError, match="choose another"):
        write_atomically(path / "under", "three")
    with pytest.raises(OutputError, match="this is a folder -> name a file in it"):
        write_atomically(path.parent, "three")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(full_disk()))
    with pytest.raises(RunFailed, match="kept"):
        write_atomically(path, "three")
    assert path.read_text() == "two"
    assert listing(path.parent) == ["file.json"]
