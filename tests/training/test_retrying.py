"""One process of several runs out of memory: all of them begin the step again. That of one is in test_cut_batches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import luthier
from luthier.training.cut_batches import ROWS, Rows
from luthier.training.retrying import Guard, RetryingTrainer, fewer_rows, size_of
from tests.small_world import losses, small_world

KEYS = {"max_steps": 4, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
"""SGD, since AdamW makes a step of the smallest gradient, which is rounding."""
STAGES: dict[str, dict[str, Any]] = {
    "sft": {},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "disable_gradient_checkpointing": False},
    "dpo": {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.3},
}
FEW = "sft-backward-1-1 sft-forward-0-2"
MORE = "lora-forward-1-1 dpo-backward-0-1 dpo-forward-1-3"
"""Stage, where memory runs out, in which process, and the rows that it has memory for; four are in a batch."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), **KEYS}


def start_two(world: dict[str, Any], folder: Path, cases: str) -> "subprocess.CompletedProcess[str]":
    files = []
    for case in cases.split():
        files.append(folder / f"{case}.yaml")
        files[-1].write_text(yaml.safe_dump({**world, **STAGES[case.split("-")[0]], "output_dir": str(folder / case)}))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.short_of_memory", *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.thorough
@pytest.mark.parametrize("cases", [FEW, MORE])
def test_the_same_losses_and_weights(world, tmp_path, cases):
    """The last case has no memory for a single row."""
    done = start_two(world, tmp_path, f"{cases} sft-backward-1-0")
    for case in cases.split():
        stage, out = case.split("-")[0], tmp_path / case
        assert not (errors := [path.read_text() for path in tmp_path.glob(f"{case}.error*")]), errors
        keys = {**world, **STAGES[stage], "per_device_train_batch_size": 8, "output_dir": str(tmp_path / stage)}
        alone, name = luthier.train(keys), "adapter_model.safetensors" if stage == "lora" else "model.safetensors"
        state = json.loads((out / "trainer_state.json").read_text())
        steps = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
        assert steps == pytest.approx(losses(alone), rel=1e-5)
        expected, found = load_file(tmp_path / stage / name), load_file(out / name)
        for weight in expected:
            torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-5, msg=weight)
    once = [case for case in cases.split() if not case.endswith("-1")]
    assert done.stderr.count("out of memory at step 1 with 4 rows at a time") == len(cases.split()) + 1
    assert done.stderr.count("out of memory at step 1 with 2 rows at a time") == len(cases.split()) - len(once) + 1
    errors = [(tmp_path / f"sft-backward-1-0.error{rank}").read_text() for rank in (0, 1)]
    assert "RunFailed: out of memory at step 0: another process of this run needs more memory" in errors[0]
    assert "RunFailed: out of memory at step 0: out of memory: tried to allocate 2.00 GiB -> set disable" in errors[1]


def test_the_steps_that_are_guarded():
    guard, guarded = Guard(), []
    for size in (10, 10, 10, 8, 12, 12, 11, 13):
        guard.begin(size)
        guarded.append(guard.is_on)
    assert guarded == [True, True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("size", "accumulated", "remedy"),
    [(4, 1, (2, 2)), (6, 3, (3, 6)), (9, 1, (3, 3)), (5, 2, (1, 10)), (1, 8, None)],
)
def test_smaller_batches_have_the_same_rows_in_a_step(size, accumulated, remedy):
    found = fewer_rows(size, accumulated)
    assert (found is None) == (remedy is None)
    if remedy is not None:
        rows, steps = remedy
        assert rows * steps == size * accumulated
        assert f"per_device_train_batch_size: {rows} and gradient_accumulation_steps: {steps}," in found


@pytest.mark.parametrize(
    ("size", "checkpointed", "saved", "remedy"),
    [
        (
            4,
            True,
            None,
            "set per_device_train_batch_size: 2 and gradient_accumulation_steps: 2, which has the same losses",
        ),
        (1, True, "checkpoint-2", "lower cutoff_len, or start more processes, and start again, which continues from"),
        (1, False, None, "set disable_gradient_checkpointing: false, or lower cutoff_len, or start more processes"),
    ],
)
def test_the_error_of_processes_that_cannot_begin_again_names_the_remedy(size, checkpointed, saved, remedy):
    """Sharded weights: the model is not wrapped by DDP."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(per_device_train_batch_size=size, gradient_accumulation_steps=1),
        last_saved=saved,
        num_parts=1,
        _begun=SimpleNamespace(batches=[{ROWS: Rows([{}] * size)}]),
        accelerator=SimpleNamespace(num_processes=2),
        model_wrapped=torch.nn.Linear(1, 1),
        policy=torch.nn.Linear(1, 1),
    )
    trainer.policy.gradient_checkpointing = checkpointed
    assert RetryingTrainer.memory_remedy(trainer).startswith(remedy)


def test_the_size_of_a_batch():
    assert size_of({"input_ids": torch.zeros(2, 3), "pixels": torch.zeros(4), ROWS: Rows([{}]), "max": 7}) == 10
