"""A disk that fails in the middle of a run: it goes on, and ends as if the disk had been fine."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

import luthier
from luthier.core.errors import RunFailed
from luthier.training import checkpointed
from luthier.training.checkpoints import store
from tests.small_world import small_world

ADAPTER = "adapter_model.safetensors"
KEYS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "val_size": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), **KEYS}


@pytest.fixture
def full_at(monkeypatch) -> Callable[..., None]:
    """Lets the checkpoints of these steps fail when their files are flushed, after all of them were written."""
    sync = store.sync

    def fail_at(*steps: int, before: Callable[[], Any] = lambda: None) -> None:
        def on_a_full_disk(draft: Path) -> None:
            if store.step_of(draft) in steps:
                before()
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(draft)

        monkeypatch.setattr(store, "sync", on_a_full_disk)

    return fail_at


def trained(world: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    luthier.train({**world, "output_dir": str(out), **more})
    return load_file(out / "model.safetensors")


def checkpoints_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*checkpoint*"))


@pytest.mark.parametrize("more", [{}, BEST], ids=["last", "best"])
def test_a_disk_that_is_full_for_a_while_changes_nothing(world, tmp_path, full_at, capsys, more):
    expected = trained(world, tmp_path / "undisturbed", **more)
    full_at(2, 3)
    weights = trained(world, tmp_path / "out", **more)
    assert checkpoints_in(tmp_path / "out") == ["checkpoint-1", "checkpoint-4"]
    assert all((weights[name] == expected[name]).all() for name in expected)
    said = capsys.readouterr().err
    assert (
        f"cannot save to {tmp_path}/out/checkpoint-3: No space left on device; the last complete checkpoint is" in said
    )
    assert said.count("; training goes on -> free some space before the next save") == 2
    luthier.train({**world, "output_dir": str(tmp_path / "out"), **more, "max_steps": 5, "overwrite_output_dir": False})
    assert f"resuming from {tmp_path}/out/checkpoint-4" in capsys.readouterr().err


def test_the_best_of_the_checkpoints_that_are_there_is_loaded(world, tmp_path, full_at):
    """The losses fall, so the last step is the best, and it is not saved."""
    full_at(3, 4)
    final = trained(world, tmp_path / "out", **BEST)
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert all((final[name] == saved[name]).all() for name in saved)


def test_a_stop_whose_checkpoint_cannot_be_saved_is_a_failure(world, tmp_path, full_at):
    """Ctrl-C during the save of step 2 stops the run after step 3."""
    pressed = []

    def press_once() -> None:
        if not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))

    full_at(2, 3, before=press_once)
    with pytest.raises(RunFailed, match=r"cannot save to .*/checkpoint-3: .* is .*/checkpoint-1 -> free some space"):
        luthier.train({**world, "output_dir": str(tmp_path / "out")})


def test_a_report_of_a_saved_checkpoint_that_cannot_be_written(world, tmp_path, monkeypatch, capsys):
    """The losses fall, so the last checkpoint is the best one; the report of the rows that were read comes after it."""
    write = checkpointed.write_json

    def full_once_saved(path: Path, content: Any) -> None:
        if (path.parent / "checkpoint-4").is_dir():
            raise RunFailed(f"{path}: it cannot be written (No space left on device); the old file is kept")
        write(path, content)

    monkeypatch.setattr(checkpointed, "write_json", full_once_saved)
    keys = {**BEST, "streaming": True, "buffer_size": 1, "save_total_limit": 2}
    final = trained(world, tmp_path / "out", **keys)
    saved = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert all((final[name] == saved[name]).all() for name in saved)
    said = capsys.readouterr().err
    assert f"warning: {tmp_path}/out/checkpoint-4 is saved; {tmp_path}/out/data_report.json: it cannot be" in said
    assert "training goes on" not in said


def test_several_processes_with_deepspeed_end_with_the_last_checkpoint(world, tmp_path, monkeypatch):
    """One of them cannot save, and the others do not know."""

    def fail(trainer: Any, *arguments: Any) -> None:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        trainer.is_deepspeed_enabled = True
        raise store.NotSaved("cannot save")

    monkeypatch.setattr(checkpointed.CheckpointedTrainer, "_write_checkpoint", fail)
    with pytest.raises(RunFailed, match=r"^cannot save -> free some space or choose another output_dir"):
        luthier.train({**world, "output_dir": str(tmp_path / "out")})
