"""The heartbeat goes on while a step is slow, and says so."""

import json
import os
from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace

import pytest
import torch

import luthier
from luthier.training.trainer import StageTrainer
from luthier.training.watch import heartbeat
from luthier.training.watch.heartbeat import Heartbeat
from tests.small_world import small_world
from tests.waiting import until


def read(folder: Path) -> dict:
    return json.loads((folder / "heartbeat.json").read_text())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)


def wait_for(folder: Path, step_seconds: float = -1.0, **facts: object) -> dict:
    """`step_seconds`: what the step has taken longer than."""

    def found() -> dict | None:
        seen = read(folder) if (folder / "heartbeat.json").exists() else {}
        is_it = seen and facts.items() <= seen.items() and (seen["step_seconds"] or 0.0) > step_seconds
        return seen if is_it else None

    return until(found, f"no heartbeat with {facts}")


def test_it_follows_a_run_from_its_data_to_its_end(tmp_path, monkeypatch):
    """During the second step the file is there, and young; at the end it is gone, and the manifest never had it."""
    keys, step, seen = {**small_world(tmp_path), "max_steps": 3}, StageTrainer.training_step, []
    out = Path(keys["output_dir"])

    def slow(trainer: StageTrainer, *arguments):
        if trainer.state.global_step == 1:
            first = wait_for(out, step=2)
            seen.append((first, wait_for(out, first["step_seconds"], step=2)))
        return step(trainer, *arguments)

    monkeypatch.setattr(StageTrainer, "training_step", slow)
    luthier.train(keys)
    ((first, second),) = seen
    assert (first["phase"], first["total_steps"], first["process"]) == ("training", 3, os.getpid())
    assert second["peak_memory_bytes"] >= second["memory_bytes"] * 0.9 > 1e7
    assert not list(out.glob("heartbeat*"))


def test_it_beats_while_data_are_prepared(tmp_path):
    beat = Heartbeat(tmp_path, "cpu")
    with beat.beating():
        assert wait_for(tmp_path, phase="preparing")["step"] is None
    assert os.listdir(tmp_path) == []


def test_what_happens_after_a_step(tmp_path):
    beat, state = Heartbeat(tmp_path, "cpu"), SimpleNamespace(global_step=4, max_steps=9)
    beat.on_step_begin(None, state, None)
    assert (beat.phase, beat.step, beat.total_steps) == ("training", 5, 9)
    for evaluates, saves, phase in ((True, True, "evaluating"), (False, True, "saving"), (False, False, "training")):
        beat.on_step_end(None, state, SimpleNamespace(should_evaluate=evaluates, should_save=saves))
        assert beat.phase == phase
    beat.on_prediction_step(None, state, None)
    assert beat.phase == "evaluating"
    beat.on_evaluate(None, state, SimpleNamespace(should_save=True))
    assert beat.phase == "saving"


def test_a_run_that_does_not_train_evaluates(tmp_path):
    beat = Heartbeat(tmp_path, "cpu")
    beat.on_prediction_step(None, None, None)
    assert beat.phase == "evaluating"
    beat.on_evaluate(None, None, SimpleNamespace(should_save=False))
    assert beat.phase == "ending"


def test_each_process_has_its_own_and_a_disk_that_fails_costs_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    beat, written = Heartbeat(tmp_path / "gone", "cpu"), Semaphore(0)
    assert beat.path.name == "heartbeat_3.json"
    monkeypatch.setattr(beat, "facts", lambda facts=beat.facts: (written.release(), facts())[1])
    with beat.beating():
        assert written.acquire(timeout=60) and written.acquire(timeout=60), "it goes on after the disk has failed"


def test_the_memory_is_that_of_the_process_on_whichever_device(monkeypatch):
    """Of the second one, while the thread of the heartbeat has the first one as its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * device)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 20 * device)
    assert heartbeat.memory_bytes("cuda") == (10, 20)
