"""Two processes are one run: the step losses of one process with the doubled batch, told and written once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.cli import main
from tests.training.runs import losses, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """Rows of different lengths, shuffled; 23 rows to evaluate on, which no two processes can share evenly."""
    values = small_world(tmp_path_factory.mktemp("a world") / "with spaces")
    data = Path(values["dataset_dir"])
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "odd.json").write_text(json.dumps(json.loads((data / "tools.json").read_text())[:23]))
    (data / "dataset_info.json").write_text(json.dumps({**info, "odd": {**info["tools"], "file_name": "odd.json"}}))
    return {
        **values,
        "disable_shuffling": False,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "eval_dataset": "odd",
        "cutoff_len": 200,
        "do_eval": True,
        "compute_accuracy": True,
        "per_device_eval_batch_size": 3,
        "plot_loss": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "overwrite_output_dir": False,
    }


def test_two_processes_are_one_run(world, tmp_path):
    values = {**world, "finetuning_type": "lora"}
    alone = luthier.train({**values, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "alone")})
    folder, run_file = tmp_path / "two processes", tmp_path / "a run.yaml"
    run_file.write_text(yaml.safe_dump({**values, "per_device_train_batch_size": 2, "output_dir": str(folder)}))
    done = start_two(run_file)
    assert done.returncode == 0, done.stderr
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [logs["loss"] for logs in state["log_history"] if "loss" in logs] == pytest.approx(losses(alone), abs=1e-5)
    evaluation = json.loads((folder / "eval_results.json").read_text())
    assert evaluation["eval_loss"] == pytest.approx(alone.metrics["eval"]["eval_loss"], abs=1e-5)
    assert evaluation["eval_accuracy"] == pytest.approx(alone.metrics["eval"]["eval_accuracy"], abs=1e-5)
    assert_told_and_written_once(done, folder, tmp_path / "alone")


@pytest.mark.parametrize(
    "keys",
    [{"stage": "dpo", "dataset": "pairs", "pref_bco_weight": 0.5}, {"stage": "kto", "dataset": "feedback"}],
    ids=["dpo", "kto"],
)
def test_two_processes_are_one_run_of_preferences(world, tmp_path, keys):
    """The means over a step, the reference and the rows to evaluate on are those of all processes."""
    common = {name: value for name, value in world.items() if name != "compute_accuracy"}
    more = {"finetuning_type": "lora", "learning_rate": 1e-3, "eval_dataset": keys["dataset"], "max_steps": 3}
    values = {**common, **keys, **more}
    alone = luthier.train({**values, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "alone")})
    folder, run_file = tmp_path / "two processes", tmp_path / "a run.yaml"
    run_file.write_text(yaml.safe_dump({**values, "per_device_train_batch_size": 2, "output_dir": str(folder)}))
    done = start_two(run_file)
    assert done.returncode == 0, done.stderr
    steps = [logs for logs in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in logs]
    expected = [logs for logs in alone.log_history if "loss" in logs]
    for found, wanted in zip(steps, expected, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-4 if name == "logps/chosen" else 1e-5)
    evaluation = json.loads((folder / "eval_results.json").read_text())
    for name in ("eval_loss", "eval_rewards/margins"):
        assert evaluation[name] == pytest.approx(alone.metrics["eval"][name], abs=1e-5)


def start_two(run_file: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "luthier", "train", str(run_file)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def assert_told_and_written_once(done: "subprocess.CompletedProcess[str]", folder: Path, alone: Path) -> None:
    assert done.stdout.count(f"saved: {folder}") == 1
    assert done.stdout.count("train_loss:") == 1
    assert done.stderr.count("trainable parameters") == 1
    assert done.stderr.count("step 5/5  loss") == 1
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    for part in (folder, folder / "checkpoint-2", folder / "checkpoint-4"):
        assert main(["verify", str(part)]) == 0
    assert {p.name for p in (folder / "checkpoint-4").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
