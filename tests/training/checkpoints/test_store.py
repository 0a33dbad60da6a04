"""Wherever a save is cut short, a whole checkpoint is there; which are whole, resumed from and removed."""

import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest

from luthier.core.drafts import this_host
from luthier.core.errors import OutputError, RunFailed
from luthier.core.manifest import verify_folder, write_manifest
from luthier.training.checkpoints import store
from luthier.training.checkpoints.shared_save import SharedSave
from luthier.training.checkpoints.store import fault_of, newest_whole, resume_point, rotate, tidy, writing
from luthier.training.checkpoints.trained_on import KEY
from tests.killing import watching
from tests.matrix import representatives

FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


def save(out: Path, step: int, content: str = "new", *, limit: int | None = None, best: Path | None = None) -> Path:
    """As the trainer saves."""
    folder = out / f"checkpoint-{step}"
    draft = out / f".checkpoints.{os.getpid()}.{this_host()}.tmp" / folder.name
    with writing(draft, folder, SharedSave()):
        for name in FILES:
            (draft / name).write_text(f"{content} {step} {name}")
        state = {"global_step": step, "stateful_callbacks": {KEY: []}}
        (draft / "trainer_state.json").write_text(json.dumps(state))
        (draft / "global_step").mkdir()
        (draft / "global_step" / "shard").write_text(content)
    rotate(folder, limit, best)
    return folder


def content_of(folder: Path) -> str:
    content, step, name = (folder / "optimizer.pt").read_text().split()
    assert (step, name) == (folder.name.removeprefix("checkpoint-"), "optimizer.pt")
    return content


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damaged(folder: Path) -> Path:
    """Other bytes of the same number, as after a loss of power."""
    path = folder / "optimizer.pt"
    path.write_bytes(bytes(path.stat().st_size))
    return folder


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch):
    """What this process has verified before is not known to the next one."""
    monkeypatch.setattr(store, "_known_whole", {})


BEFORE = {"one": [1], "two": [1, 2], "the same step": [1, 3]}


@pytest.mark.parametrize(
    ("steps", "limit"),
    representatives(
        [("one", None), ("one", 1), ("two", 1), ("two", 2), ("the same step", None), ("the same step", 1)],
        ("two", 1),
        ("the same step", None),
    ),
)
def test_wherever_a_save_is_cut_short_a_whole_checkpoint_is_there(tmp_path, monkeypatch, steps, limit):
    """The newest, and never an older one than before. The next start leaves nothing else, and may be cut short too."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
    before = tmp_path / "before"
    for step in BEFORE[steps]:
        save(before, step, "old")
    for kill_at in count():
        out = shutil.copytree(before, tmp_path / "out")
        with watching(out, kill_at) as changes:
            save(out, 3, limit=limit)
        is_complete = len(changes) < kill_at
        for second in count():
            again = shutil.copytree(out, tmp_path / "again")
            with watching(again, second) as tidied:
                tidy(again)
            tidy(again)
            found = newest_whole(again)
            outcomes = [(3, "new")] if is_complete else [(3, "new"), (BEFORE[steps][-1], "old")]
            assert found is not None and (store.step_of(found), content_of(found)) in outcomes
            assert all(name.startswith("checkpoint-") and not fault_of(again / name) for name in listing(again))
            shutil.rmtree(again)
            if len(tidied) < second:
                break
        shutil.rmtree(out)
        if is_complete:
            break
    assert kill_at > 10


def test_the_order_of_a_save(tmp_path, monkeypatch):
    """Files are flushed before the manifest names them, all of it before the rename, and that before anything goes."""
    out, fsync = tmp_path / "out", os.fsync
    save(out, 1)
    with watching(out) as changes:

        def flush(number: int) -> None:
            changes.append(f"flush {Path(os.readlink(f'/proc/self/fd/{number}')).relative_to(out)}")
            fsync(number)

        monkeypatch.setattr(os, "fsync", flush)
        save(out, 2, limit=1)
    ours = f"{os.getpid()}.{this_host()}"
    draft = f".checkpoints.{ours}.tmp/checkpoint-2"
    manifest = changes.index(f"rename {draft}/.manifest.json.{ours}.tmp")
    renamed = changes.index(f"rename {draft}")
    for name in (*FILES, "global_step/shard", "global_step"):
        flushed = changes.index(f"flush {draft}/{name}")
        assert flushed < manifest
        assert not any(change == f"open {draft}/{name}" for change in changes[flushed + 1 :])
    assert manifest < changes.index(f"flush {draft}", manifest) < renamed < changes.index("flush .", renamed)
    removals = [place for place, change in enumerate(changes) if "checkpoint-1" in change]
    assert changes.index("flush .", renamed) < removals[0] == changes.index("rename checkpoint-1")
    assert listing(out) == ["checkpoint-2"]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_only_whole_checkpoints_count_and_the_newest_and_the_best_stay(tmp_path, limit):
    for step in (2, 10, 9, 100):
        save(tmp_path, step)
    damaged(tmp_path / "checkpoint-100")
    (save(tmp_path, 99) / "manifest.json").unlink()
    save(tmp_path, 101, limit=limit, best=tmp_path / "checkpoint-2")
    kept = {1: [], 2: [], 3: [10]}[limit]
    assert {path.name for path in store.checkpoints_in(tmp_path)} == {
        f"checkpoint-{step}" for step in (2, 99, 100, 101, *kept)
    }


def test_age_is_the_step_whatever_the_time_stamps_say(tmp_path):
    for step, seconds in ((9, 300), (10, 100), (8, 900)):
        os.utime(save(tmp_path, step), (seconds, seconds))
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    save(tmp_path, 11, limit=2)
    assert listing(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_a_half_removed_checkpoint_takes_no_place(tmp_path):
    """Its time stamp is the newest of all."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    save(tmp_path, 4, limit=2)
    assert listing(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_after_resuming_from_an_earlier_step_the_later_ones_go_first(tmp_path, said):
    for step in (2, 4, 6):
        save(tmp_path, step)
    asked = str(tmp_path / "checkpoint-2")
    assert resume_point(tmp_path, asked, overwrite=False) == Path(asked)
    (warning,) = said
    assert f"{tmp_path} also holds later checkpoints (checkpoint-4, checkpoint-6), which a run without" in warning
    save(tmp_path, 3, limit=2)
    assert listing(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert newest_whole(tmp_path, until_step=2) == tmp_path / "checkpoint-2"


def spoil(folder: Path, how: str) -> None:
    path = folder / "optimizer.pt"
    if how == "damaged manifest":
        (folder / "manifest.json").write_bytes(b"\0" * 100)
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5])
    elif how == "zeros":
        damaged(folder)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "an inner file":
        (folder / "global_step" / "shard").unlink()
    else:
        (folder / how).unlink()


SPOILT = {
    "manifest.json": "incomplete: it has no manifest.json",
    "optimizer.pt": "incomplete: optimizer.pt: missing",
    "an inner file": "incomplete: global_step/shard: missing",
    "a folder": "incomplete: optimizer.pt: missing",
    "truncated": "incomplete: optimizer.pt: truncated, 5 of 18 bytes",
    "longer": "damaged: optimizer.pt: changed, 19 bytes instead of 18",
    "zeros": "damaged: optimizer.pt: changed, same size but another sha256",
    "damaged manifest": "damaged: {}/manifest.json: is not a manifest",
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_verify_does_not_accept_is_named_and_passed_over(tmp_path, said, how):
    save(tmp_path, 2)
    last = save(tmp_path, 4)
    spoil(last, how)
    fault = fault_of(last)
    assert fault is not None and str(fault).startswith(SPOILT[how].format(last))
    with pytest.raises(OutputError) as refused:
        resume_point(tmp_path, str(last), overwrite=False)
    assert f"resume_from_checkpoint: {last}: " in str(refused.value) and " -> choose an earlier one" in str(
        refused.value
    )
    said.clear()
    assert resume_point(tmp_path, None, overwrite=False) == tmp_path / "checkpoint-2"
    assert said == [f"warning: {last} is {fault.state} and is not used: {fault.reason}"]
    save(tmp_path, 4)
    assert verify_folder(last) == []


def test_without_a_whole_checkpoint_training_starts_from_scratch_and_says_so(tmp_path, said):
    (save(tmp_path, 2) / "manifest.json").unlink()
    assert resume_point(tmp_path, None, overwrite=False) is None
    assert f"{tmp_path} has no complete checkpoint (checkpoint-2), so training starts from scratch" in said[-1]
    with pytest.raises(OutputError, match="has no complete checkpoint"):
        resume_point(tmp_path, True, overwrite=False)
    assert resume_point(tmp_path, None, overwrite=True) is None


def test_a_checkpoint_without_its_manifest_is_taken_once_its_files_are_recorded(tmp_path):
    from luthier.run.verify import main

    folder = save(tmp_path, 2)
    (folder / "manifest.json").unlink()
    with pytest.raises(OutputError, match=f"`luthier verify --record {folder}` accepts its files as they are"):
        resume_point(tmp_path, str(folder), overwrite=False)
    assert main(["--record", str(folder)]) == 0
    assert resume_point(tmp_path, str(folder), overwrite=False) == folder


def test_a_verified_folder_that_is_no_checkpoint_is_not_resumed_from(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_text("weights")
    write_manifest(tmp_path / "export")
    with pytest.raises(OutputError, match="not a checkpoint of a training run"):
        resume_point(tmp_path / "out", str(tmp_path / "export"), overwrite=False)


def test_a_checkpoint_changed_after_it_was_written_no_longer_counts(tmp_path):
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    assert store.is_whole(last)
    damaged(last)
    assert not store.is_whole(last)


@pytest.fixture
def ended_process() -> int:
    """The number of no process: Linux gives none above 2^22."""
    return 2**22 + 1


def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(tmp_path, ended_process):
    whole = save(tmp_path, 4)
    running, host = os.getppid(), this_host()
    for name in (".{}.tmp", ".{}.{host}.tmp", ".checkpoints.{}.{host}.tmp", ".checkpoint-2.{}.{host}.tmp"):
        for number in (ended_process, running):
            shutil.copytree(whole, tmp_path / name.format(number, host=host))
    for number in (ended_process, running):
        (tmp_path / f".data_report.json.{number}.{host}.tmp").write_text("half")
        shutil.copytree(whole, tmp_path / f".checkpoint-4.{number}.{host}.earlier")
    shutil.copytree(whole, tmp_path / ".checkpoint-4.earlier")  # of an earlier version
    (tmp_path / ".notes").write_text("of the user")
    tidy(tmp_path)
    left = listing(tmp_path)
    assert [name for name in left if str(running) not in name] == [".notes", "checkpoint-4"]
    assert len(left) == 8 and not any(str(ended_process) in name for name in left)
    assert verify_folder(whole) == []


@pytest.mark.parametrize("name", [".checkpoint-4.earlier", ".checkpoint-4.{}.{}.earlier"])
def test_a_checkpoint_that_was_set_aside_gets_its_name_again(tmp_path, ended_process, name):
    save(tmp_path, 2)
    save(tmp_path, 4).rename(tmp_path / name.format(ended_process, this_host()))
    tidy(tmp_path)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-4"
    assert listing(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_rename_that_fails_puts_the_earlier_checkpoint_back(tmp_path, monkeypatch):
    folder = save(tmp_path, 4, "old")
    replace = Path.replace

    def fails_once(path: Path, target: Path) -> Path:
        if path.parent.name.startswith(".checkpoints"):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails_once)
    with (
        pytest.raises(RunFailed, match=f"No space left .* complete checkpoint is {folder}"),
        store.saving(folder),
    ):
        save(tmp_path, 4)
    assert content_of(folder) == "old" and verify_folder(folder) == []
    assert listing(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("lost", "missing"),
    [
        ((), []),
        (("optimizer.pt",), ["optimizer"]),
        (("rng_state_0.pth",), ["random numbers"]),
        (
            ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"),
            ["optimizer", "learning rate schedule", "random numbers"],
        ),
    ],
)
def test_states_that_a_checkpoint_does_not_hold(tmp_path, lost, missing):
    for name in {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"} - set(lost):
        (tmp_path / name).write_text(json.dumps({}))
    assert store.missing_states(tmp_path) == missing


def test_a_folder_of_deepspeed_holds_optimizer_and_schedule(tmp_path):
    (tmp_path / "global_step4").mkdir()
    assert store.missing_states(tmp_path) == ["random numbers"]
