"""Whole sweeps: the runs are ordinary ones, a failed run costs nothing but itself, and a killed sweep goes on."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import yaml

from luthier.cli import main
from luthier.core.errors import ConfigError, OutputError
from luthier.core.manifest import CONSOLE, EXIT, verify_folder
from luthier.workflow.sweep import sweep
from luthier.workflow.sweep.one_run import locked, state_of
from tests.holding import Hold
from tests.small_world import small_world
from tests.waiting import until

BASE = {"finetuning_type": "lora", "max_steps": 4, "val_size": 4, "do_eval": True, "lora_rank": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run_file(world, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**world, **BASE, "output_dir": str(tmp_path / "out")}))
    return str(path)


def test_a_run_that_fails_does_not_keep_the_others_from_running(run_file, tmp_path, capsys):
    """It is the first; a learning rate of 1e30 makes weights that are no numbers, which no check can know before."""
    assert main(["sweep", run_file, "learning_rate=1e30,1e-3"]) == 1
    bad, good = tmp_path / "out" / "learning_rate-1e30", tmp_path / "out" / "learning_rate-1e-3"
    assert (state_of(bad), state_of(good)) == ("failed", "done")
    out = capsys.readouterr().out
    assert f"best by eval_loss: {good}" in out and "learning_rate-1e30 failed: " in out and "Traceback" not in out
    assert verify_folder(good) == [] and (good / "adapter_model.safetensors").is_file()
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["state"] for run in data["runs"]] == ["done", "failed"]
    assert data["runs"][0]["metrics"]["eval_loss"] > 0 and "the loss became nan" in data["runs"][1]["error"]
    assert (tmp_path / "out" / "sweep.md").is_file() and (tmp_path / "out" / "sweep.png").is_file()


def test_nothing_starts_if_one_run_has_a_fault(run_file, tmp_path):
    with pytest.raises(ConfigError, match="must be a whole number"):
        sweep([run_file, "lora_rank=4,x"])
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_a_killed_sweep_goes_on(run_file, tmp_path):
    """Killed in its second run, which ends with it: the first is not run again, the second resumes."""
    words = [run_file, "learning_rate=1e-3,1e-4", "max_steps=6", "save_steps=2", "save_strategy=steps"]
    first, second = tmp_path / "out" / "learning_rate-1e-3", tmp_path / "out" / "learning_rate-1e-4"
    hold = Hold(tmp_path, "learning_rate-1e-4/checkpoint-4")
    command, environment = [sys.executable, "-m", "luthier", "sweep", *words], {**os.environ, **hold.environment}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    until(lambda: hold.holds)
    process.kill()
    process.wait()
    until(lambda: is_free(second))
    assert state_of(first) == "done" and state_of(second) == "waiting"
    ended = (first / EXIT).read_bytes()
    table, was_stopped = sweep(words)
    assert not was_stopped and table.num_done == 2 and (first / EXIT).read_bytes() == ended
    assert "resuming from" in (second / CONSOLE).read_text()
    assert json.loads((second / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.thorough
def test_a_signal_lets_the_run_save_a_checkpoint(run_file, tmp_path, capsys):
    first = tmp_path / "out" / "learning_rate-1e-3"

    def interrupt():
        until(lambda: (first / "trainer_log.jsonl").is_file())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["sweep", run_file, "learning_rate=1e-3,1e-4", "max_steps=100000"]) == 130
    assert state_of(first) == "stopped" and len(list(first.glob("checkpoint-*"))) == 1
    assert not (tmp_path / "out" / "learning_rate-1e-4").exists()
    assert "waiting" in capsys.readouterr().out


def is_free(folder) -> bool:
    """Whether no process of a run is left."""
    try:
        locked(folder / CONSOLE).close()
    except OutputError:
        return False
    return True
