"""Names of drafts, and which of them a later process may remove."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from luthier.core.drafts import ABANDONED_SECONDS, draft_name, is_draft, remove_abandoned, runs_here, this_host
from luthier.core.files import save_folder_atomically
from luthier.core.manifest import manifest_files


@pytest.fixture(scope="module")
def ended() -> int:
    """The number of no process: Linux gives none above 2^22."""
    return 2**22 + 1


def test_a_name_tells_the_process():
    assert draft_name("a.json") == f".a.json.{os.getpid()}.{this_host()}.tmp"
    assert draft_name() == f".{os.getpid()}.{this_host()}.tmp"
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(draft_name, "a.json").result()
    assert other != draft_name("a.json") and is_draft(other)
    assert is_draft(draft_name()) and is_draft(draft_name("x.12.tmp")) and is_draft(".77.tmp")
    assert not any(is_draft(name) for name in ("a.77.tmp", ".tmp", ".notes.tmp", ".77.tmp.json", "checkpoint-3"))


def test_running_and_ended_processes(ended):
    assert runs_here(os.getppid())
    assert not runs_here(ended)
    assert not runs_here(os.getpid()), "what this process wrote before is a draft of nobody"


def test_only_drafts_of_ended_processes_are_removed(tmp_path, ended):
    running = os.getppid()
    for name in (f".{ended}.tmp", f".a.{ended}.tmp", f".a.{ended}.{this_host()}.tmp", draft_name("b")):
        (tmp_path / name).write_text("half")
    kept = {f".{running}.tmp", f".a.{running}.{this_host()}.tmp", "a", ".a", f"a.{ended}.tmp", ".words.tmp"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_draft_of_another_machine_is_abandoned_when_nothing_has_changed_for_long(tmp_path, ended):
    names = [f".{ended}.h0000000.tmp", f".a.{ended}.h0000000.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for path in (tmp_path / names[0] / "file", tmp_path / names[0], tmp_path / names[1]):
        os.utime(path, (long_ago, long_ago))
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [names[1]]


@pytest.mark.parametrize("name", ["out", "[x] $HOME #1"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_is_written_again_loses_the_drafts_of_a_killed_process(tmp_path, ended, name, exists):
    target = tmp_path / name
    left = target / f".{ended}.tmp" if exists else tmp_path / f".{name}.{ended}.{this_host()}.tmp"
    other = tmp_path / f".another.{ended}.tmp"
    for folder in (left, other):
        folder.mkdir(parents=True)
    with save_folder_atomically(target) as folder:
        (folder / "file").write_text("whole")
    assert sorted(path.name for path in target.iterdir()) == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, name])


def test_a_manifest_names_no_drafts(tmp_path):
    (tmp_path / draft_name()).mkdir()
    (tmp_path / draft_name() / "file").write_text("half")
    (tmp_path / draft_name("a")).write_text("half")
    (tmp_path / "a").write_text("whole")
    assert [path.name for path in manifest_files(tmp_path)] == ["a"]
