"""Two processes are one run: the step losses of one process with the doubled batch, told and written once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import luthier
from luthier.cli import main
from tests.small_world import losses, small_world
from tests.tiny import tiny_llama


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


@pytest.mark.thorough
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
    assert_logged_and_written_once(done, folder, tmp_path / "alone")


ANSWERS = {
    "max_new_tokens": 6,
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 0,
    "reward_funcs": "tests.small_world:small_letters",
}
PREFERENCES = {
    "dpo": {"stage": "dpo", "dataset": "pairs", "pref_bco_weight": 0.5},
    "kto": {"stage": "kto", "dataset": "feedback"},
}
STAGES_ALIKE = {
    "rm": {"stage": "rm", "dataset": "pairs"},
    "gkd": {"stage": "gkd", "gkd_beta": 0.3},
    "gkd own answers": {"stage": "gkd", "gkd_lambda": 0.5, "max_new_tokens": 6, "top_k": 0},
    "ppo": {**ANSWERS, "stage": "ppo", "ppo_epochs": 2, "ppo_buffer_size": 2, "ppo_score_norm": True}
    | {"ppo_whiten_rewards": True},
    "grpo": {**ANSWERS, "stage": "grpo", "num_generations": 4, "num_iterations": 2, "grpo_beta": 0.1},
}


@pytest.fixture(scope="module")
def alike(world, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The keys of each run but for its folder; the batch is that of one process."""
    left_out = ("compute_accuracy", "eval_dataset", "do_eval", "plot_loss")
    common = {key: value for key, value in world.items() if key not in left_out}
    common |= {"finetuning_type": "lora", "learning_rate": 1e-3, "save_strategy": "no"}
    teacher = str(tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7, max_position_embeddings=1024))
    common |= {"per_device_train_batch_size": 8}
    runs = {
        name: {**common, **keys, **({"teacher_model": teacher} if keys["stage"] == "gkd" else {})}
        for name, keys in STAGES_ALIKE.items()
    }
    common = {name: value for name, value in world.items() if name != "compute_accuracy"}
    common |= {"finetuning_type": "lora", "learning_rate": 1e-3, "max_steps": 3, "per_device_train_batch_size": 4}
    return runs | {name: {**common, **keys, "eval_dataset": keys["dataset"]} for name, keys in PREFERENCES.items()}


@pytest.fixture(scope="module")
def of_two(alike, tmp_path_factory) -> Path:
    """Where two processes have left each run, in a folder of its name: one start for all, each with half the batch."""
    folder, run_files = tmp_path_factory.mktemp("two"), []
    for name, keys in alike.items():
        half = keys["per_device_train_batch_size"] // 2
        values = {**keys, "per_device_train_batch_size": half, "output_dir": str(folder / name)}
        run_files.append(folder / f"{name}.yaml")
        run_files[-1].write_text(yaml.safe_dump(values))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.each_of", *map(str, run_files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name", PREFERENCES)
def test_two_processes_are_one_run_of_preferences(alike, of_two, tmp_path, name):
    """The means over a step, the reference and the rows to evaluate on are those of all processes."""
    alone = luthier.train({**alike[name], "output_dir": str(tmp_path)})
    state = json.loads((of_two / name / "trainer_state.json").read_text())
    steps = [logs for logs in state["log_history"] if "loss" in logs]
    expected = [logs for logs in alone.log_history if "loss" in logs]
    for found, wanted in zip(steps, expected, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen"):
            assert found[key] == pytest.approx(wanted[key], abs=1e-4 if key == "logps/chosen" else 1e-5)
    evaluation = json.loads((of_two / name / "eval_results.json").read_text())
    for key in ("eval_loss", "eval_rewards/margins"):
        assert evaluation[key] == pytest.approx(alone.metrics["eval"][key], abs=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", STAGES_ALIKE)
def test_two_processes_log_what_one_logs(alike, of_two, tmp_path, name):
    """Step by step every number, over both: losses, rewards, divergences, lengths of answers that are drawn."""
    alone = luthier.train({**alike[name], "output_dir": str(tmp_path)})
    state = json.loads((of_two / name / "trainer_state.json").read_text())
    steps = [numbers_of(logs) for logs in state["log_history"] if "loss" in logs]
    expected = [numbers_of(logs) for logs in alone.log_history if "loss" in logs]
    assert len(steps) == 5
    for found, wanted in zip(steps, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5, rel=1e-4)
    both, one = (load_file(folder / "adapter_model.safetensors") for folder in (of_two / name, tmp_path))
    assert both.keys() == one.keys()
    assert all((both[weight] - one[weight]).abs().max() < 1e-4 for weight in one)


def numbers_of(logs: dict[str, Any]) -> dict[str, float]:
    """What does not depend on the machine or the clock."""
    return {name: value for name, value in logs.items() if name != "throughput"}


def start_two(run_file: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "luthier", "train", str(run_file)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def assert_logged_and_written_once(done: "subprocess.CompletedProcess[str]", folder: Path, alone: Path) -> None:
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
