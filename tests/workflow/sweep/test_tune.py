"""A sweep through Ray Tune: the same folders and table as without Ray."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from luthier.core.manifest import CONSOLE, verify_folder
from luthier.workflow.sweep.one_run import locked, state_of
from luthier.workflow.sweep.tune import run_with_tune
from tests.small_world import small_world


def test_nothing_left_needs_no_ray(tmp_path):
    run_with_tune([], tmp_path)


@pytest.mark.thorough
def test_a_sweep_through_tune(tmp_path):
    """One run fails, with weights that are no numbers; the secret of the environment is in no file of Ray."""
    pytest.importorskip("ray")
    values = small_world(tmp_path / "world")
    more = {"finetuning_type": "lora", "max_steps": 3, "val_size": 4, "do_eval": True}
    more |= {"ray_init_kwargs": {"address": "local", "num_cpus": 2}, "ray_storage_path": str(tmp_path / "ray")}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**values, **more, "output_dir": str(tmp_path / "out")}))
    words = [sys.executable, "-m", "luthier", "sweep", str(run_file), "learning_rate=1e30,1e-3"]
    own = {**os.environ, "USE_RAY": "1", "OMP_NUM_THREADS": "1", "A_TOKEN": "secret-4711"}
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    bad, good = tmp_path / "out" / "learning_rate-1e30", tmp_path / "out" / "learning_rate-1e-3"
    assert (state_of(bad), state_of(good)) == ("failed", "done") and verify_folder(good) == []
    assert f"best by eval_loss: {good}" in done.stdout and "learning_rate-1e30 failed: " in done.stdout
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["state"] for run in data["runs"]] == ["done", "failed"]
    assert (tmp_path / "out" / "sweep.png").is_file()
    written = [path for path in (tmp_path / "ray").rglob("*") if path.is_file()]
    assert written and not any(b"secret-4711" in path.read_bytes() for path in written)


@pytest.mark.thorough
def test_a_trial_that_cannot_start_its_run_is_an_error(tmp_path):
    """Its state alone would say that a signal has stopped it."""
    pytest.importorskip("ray")
    values = {**small_world(tmp_path / "world"), "ray_init_kwargs": {"address": "local", "num_cpus": 1}, "max_steps": 1}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "out")}))
    held = tmp_path / "out" / "learning_rate-1e-4"
    held.mkdir(parents=True)
    words = [sys.executable, "-m", "luthier", "sweep", str(run_file), "learning_rate=1e-4,1e-3"]
    with locked(held / CONSOLE):
        own = {**os.environ, "USE_RAY": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "luthier: Ray Tune: " in done.stderr and "a run is going on in this folder" in done.stderr
