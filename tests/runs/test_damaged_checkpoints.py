"""Whatever happens to checkpoints, the newest that verifies is taken, and the others are named with the reason."""

import os
import random
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from luthier.core.errors import LuthierError, OutputError
from luthier.core.files import save_folder_atomically
from luthier.core.manifest import write_manifest
from luthier.run.verify import main as verify
from luthier.training.checkpoints import store
from luthier.training.checkpoints.store import fault_of, newest_whole, resume_point, rotate, tidy
from tests.killing import watching
from tests.power_cut import recorded
from tests.training.checkpoints.test_store import BEFORE, content_of, listing, save


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch):
    monkeypatch.setattr(store, "_known_whole", {})


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def fill_with_zeros(path: Path, chance: random.Random) -> None:
    start = chance.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:start] + bytes(path.stat().st_size - start))


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def remove_file(path: Path, chance: random.Random) -> None:
    path.unlink()


def lengthen(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(chance.randrange(1, 9)))


def remove_half(path: Path, chance: random.Random) -> None:
    """As a removal that was killed, with one file at least."""
    files = [other for other in path.parent.rglob("*") if other.is_file()]
    for other in chance.sample(files, chance.randrange(1, len(files) + 1)):
        other.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(cut, fill_with_zeros, flip_a_bit, remove_file, lengthen, remove_half),
)


def is_noticed(path: Path, before: bytes) -> bool:
    """Spaces and the time of a manifest may change, and it says the same."""
    return not path.is_file() or path.read_bytes() != before


def test_the_newest_that_verifies_is_taken_whatever_happened_to_the_others(tmp_path, said):
    """200 times: any damage to any file of any of the newer checkpoints."""
    chance = random.Random(0)
    whole = tmp_path / "whole"
    for step in (2, 4, 6, 8):
        save(whole, step)
    for number in range(200):
        out = Path(shutil.copytree(whole, tmp_path / str(number)))
        num_damaged = chance.randrange(1, 4)
        for step in (8, 6, 4)[:num_damaged]:
            path = chance.choice(sorted(path for path in (out / f"checkpoint-{step}").iterdir() if path.is_file()))
            if path.name == "manifest.json":
                chance.choice((cut, remove_file, remove_half))(path, chance)
            else:
                damage, before = chance.choice(DAMAGES), path.read_bytes()
                while not is_noticed(path, before):  # zeros where there were zeros change nothing
                    damage(path, chance)
        said.clear()
        taken = resume_point(out, None, overwrite=False)
        assert taken == out / f"checkpoint-{(8, 6, 4, 2)[num_damaged]}"
        passed = [line for line in said if " and is not used: " in line]
        assert [line.split(" is ")[0] for line in passed] == [
            f"warning: {out}/checkpoint-{step}" for step in (8, 6, 4)[:num_damaged]
        ]
        assert all(line.split(" and is not used: ")[1] for line in passed)
        shutil.rmtree(out)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_checkpoint_of_another_user_is_passed_over(tmp_path, said, mode):
    """It may be listed, but not entered."""
    save(tmp_path, 2)
    last = save(tmp_path, 8)
    last.chmod(mode)
    own = os.geteuid()
    folders = [folder for folder in (tmp_path, *tmp_path.parents) if not folder.stat().st_mode & 0o001]
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        folder.chmod(modes[folder] | 0o055)
    os.seteuid(65534)
    try:
        assert resume_point(tmp_path, None, overwrite=False) == tmp_path / "checkpoint-2"
        with pytest.raises(OutputError, match="Permission denied: the checkpoint is unreadable"):
            resume_point(tmp_path, str(last), overwrite=False)
        with pytest.raises(OutputError, match="cannot be read"):
            verify([str(last)])
        with pytest.raises(LuthierError, match=r"Permission denied"):
            verify(["--record", str(last)])
        rotate(tmp_path / "checkpoint-2", 1, None)
    finally:
        os.seteuid(own)
        for folder in folders:
            folder.chmod(modes[folder])
    assert f"warning: {last} is unreadable and is not used: Permission denied" in said


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b"{}"])
def test_a_state_that_cannot_be_read_is_passed_over_even_if_it_was_recorded_like_that(tmp_path, content):
    save(tmp_path, 2)
    last = save(tmp_path, 8)
    (last / "trainer_state.json").write_bytes(content)
    write_manifest(last)
    assert str(fault_of(last)).startswith("incomplete: it has no readable trainer_state.json, so it is not a checkp")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("steps", BEFORE)
@pytest.mark.parametrize("survivors", ["write_flushed", "write_names"])
def test_a_power_cut_never_costs_both_the_old_and_the_new_checkpoint(tmp_path, steps, survivors):
    """At every change of a file during a save with a limit of one, which removes the old checkpoints behind it."""
    before = tmp_path / "before"
    for step in BEFORE[steps]:
        save(before, step, "old")
    for kill_at in count():
        out = Path(shutil.copytree(before, tmp_path / "out"))
        with recorded(out) as disk:
            with watching(out, kill_at) as changes:
                save(out, 3, limit=1)
            after = getattr(disk, survivors)(tmp_path / "after")
        is_complete = len(changes) < kill_at
        tidy(after)
        found = newest_whole(after)
        outcomes = [(3, "new")] if is_complete else [(3, "new"), (BEFORE[steps][-1], "old")]
        assert found is not None and (store.step_of(found), content_of(found)) in outcomes, changes[-3:]
        shutil.rmtree(after)
        shutil.rmtree(out)
        if is_complete:
            break
    assert kill_at > 10


@pytest.mark.parametrize("survivors", ["write_flushed", "write_names"])
def test_a_power_cut_after_the_last_save_keeps_the_weights_or_the_checkpoint(tmp_path, survivors):
    """Checkpoints of an earlier run go when the final weights are there."""
    for kill_at in count():
        out = tmp_path / "out"
        save(out, 3, "old")
        (out / "model.safetensors").write_text("old")
        with recorded(out) as disk:
            with watching(out, kill_at) as changes:
                with save_folder_atomically(out, replaces=("model*.safetensors",)) as folder:
                    (folder / "model.safetensors").write_text("new")
                store.remove(out / "checkpoint-3")
            after = getattr(disk, survivors)(tmp_path / "after")
        is_complete = len(changes) < kill_at
        assert (after / "model.safetensors").read_text() == "new" or (
            not is_complete and newest_whole(after) == after / "checkpoint-3"
        )
        shutil.rmtree(after)
        shutil.rmtree(out)
        if is_complete:
            break
    assert kill_at >= 4 and os.listdir(tmp_path) == []


def test_names_are_left_as_they_are(tmp_path):
    """The two models of a disk differ in what was not flushed, and in nothing else."""
    save(tmp_path / "out", 2)
    with recorded(tmp_path / "out") as disk:
        (tmp_path / "out" / "unflushed").write_text("x")
        names = disk.write_names(tmp_path / "names")
        flushed = disk.write_flushed(tmp_path / "flushed")
    assert listing(flushed) == ["checkpoint-2"]
    assert listing(names) == ["checkpoint-2", "unflushed"] and (names / "unflushed").read_bytes() == b"\0"
