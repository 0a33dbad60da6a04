"""What a run says and writes when it ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.workflow.outcome import resume_hint, with_speed_per_device


def run_with(**keys: Any) -> Any:
    training = {"overwrite_output_dir": False, "resume_from_checkpoint": None, **keys}
    return SimpleNamespace(training=training, finetuning=SimpleNamespace(include_effective_tokens_per_second=True))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "run the same command to resume"),
        ({"resume_from_checkpoint": True}, "run the same command to resume"),
        ({"resume_from_checkpoint": "elsewhere"}, "set resume_from_checkpoint: {} to resume"),
        ({"overwrite_output_dir": True}, "set resume_from_checkpoint: {} to resume"),
    ],
)
def test_a_stopped_run_says_how_to_resume(tmp_path, monkeypatch, keys, text):
    saved = tmp_path / "checkpoint-2"
    monkeypatch.setattr("luthier.training.checkpoints.store.newest_whole", lambda folder, until_step: saved)
    assert resume_hint(run_with(**keys), tmp_path, 2) == f"stopped: {saved} is saved -> {text.format(saved)}"


def test_a_run_stopped_before_its_first_step_starts_again(tmp_path):
    assert resume_hint(run_with(), Path(tmp_path), 0).startswith("stopped: no step has ended, so nothing is saved")


def test_speed_per_device_is_that_of_one_process():
    trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=4))
    assert with_speed_per_device(run_with(), trainer, {"train_tokens_per_second": 10.0}) == {
        "train_tokens_per_second": 10.0,
        "effective_tokens_per_sec": 2.5,
    }
