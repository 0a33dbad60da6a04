"""Two processes that share a policy through FSDP 2 or DeepSpeed sample and learn what one process does."""

import importlib.util
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
from tests.small_world import small_world
from tests.tiny import tiny_llama

ANSWERS = {"max_new_tokens": 6, "top_p": 0.95, "top_k": 0, "reward_funcs": "tests.small_world:small_letters"}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"stage": "grpo", "finetuning_type": "lora", "num_generations": 4, "num_iterations": 2, "grpo_beta": 0.1},
    "grpo, all weights": {"stage": "grpo", "finetuning_type": "full", "num_generations": 4, "grpo_beta": 0.1},
    "gkd": {"stage": "gkd", "finetuning_type": "lora", "gkd_lambda": 0.5, "reward_funcs": None},
    "ppo": {"stage": "ppo", "finetuning_type": "lora", "ppo_epochs": 2, "ppo_buffer_size": 2},
}
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"fsdp": "full_shard auto_wrap"},
    "zero2": {"deepspeed": "examples/deepspeed/ds_z2_config.json"},
    "zero3": {"deepspeed": "examples/deepspeed/ds_z3_config.json"},
}
WITH_DEEPSPEED = ("grpo", "grpo, all weights", "ppo")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
PAIRS = [(engine, name) for engine in ENGINES for name in CASES if engine == "fsdp2" or name in WITH_DEEPSPEED]
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    common = {"cutoff_len": 200, "gradient_accumulation_steps": 2, "max_steps": 4, "per_device_train_batch_size": 8}
    common |= {"learning_rate": 1e-3, "temperature": 1.0, "lr_scheduler_type": "constant"}
    CASES["gkd"]["teacher_model"] = str(tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7))
    return {**values, **common, **ANSWERS}


@pytest.fixture(scope="module")
def of_two(world, tmp_path_factory) -> Path:
    """Where two processes have left each run: one start for all, each with half the batch."""
    folder, run_files = tmp_path_factory.mktemp("two"), []
    for engine, name in PAIRS:
        if engine == "fsdp2" or HAS_DEEPSPEED:
            out = folder / f"{engine} {name}"
            values = {**world, **CASES[name], **ENGINES[engine], "per_device_train_batch_size": 4}
            run_files.append(folder / f"{out.name}.yaml")
            run_files[-1].write_text(yaml.safe_dump({**values, "output_dir": str(out)}))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.each_of", *map(str, run_files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def of_one(world, tmp_path_factory):
    """Name -> result and folder of the run of one process; each is made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("one")
            made[name] = luthier.train({**world, **CASES[name], "output_dir": str(folder)}), folder
        return made[name]

    return get


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_two_processes_learn_what_one_does(of_one, of_two, engine, name):
    """Every logged number of each step (rewards, lengths of answers, divergences, losses), and the weights."""
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    alone, own = of_one(name)
    folder = of_two / f"{engine} {name}"
    for error in sorted(of_two.glob(f"{folder.name}.error*")):
        pytest.fail(error.read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    steps = [numbers_of(logs) for logs in state["log_history"] if "loss" in logs]
    expected = [numbers_of(logs) for logs in alone.log_history if "loss" in logs]
    assert len(steps) == 4
    for found, wanted in zip(steps, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5, rel=1e-4)
    for file in own.glob("*.safetensors"):
        both, one = load_file(folder / file.name), load_file(file)
        assert both.keys() == one.keys() and one
        assert all((both[weight] - one[weight]).abs().max() < 1e-4 for weight in one)


def numbers_of(logs: dict[str, Any]) -> dict[str, float]:
    """What does not depend on the machine or the clock."""
    return {name: value for name, value in logs.items() if name != "throughput"}
