"""Runs that are killed at random moments, from the reading of the data to the last save, and resumed until they end.

KILL_SEED=... chooses other moments. They are CPU seconds of the run, so a busy machine does not change them much.
"""

import json
import math
import os
import random
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.core.drafts import is_draft
from luthier.core.manifest import verify_folder
from luthier.training.checkpoints.store import checkpoints_in, newest_whole, step_of
from tests import killable
from tests.matrix import representatives
from tests.small_world import small_world

KILLS = {True: 7, False: 3}
"""Of each kind: of those of `make test-all`, and of the two of `make test`."""
STEPS = 8
"""Two more than an epoch has."""
DPO = {"stage": "dpo", "dataset": "pairs", "learning_rate": 1e-3}
GRPO = {
    "stage": "grpo",
    "num_generations": 4,
    "num_iterations": 2,
    "grpo_beta": 0.1,
    "learning_rate": 1e-3,
    "max_new_tokens": 6,
    "temperature": 1.0,
    "top_k": 0,
    "reward_funcs": "tests.small_world:small_letters",
}
FULL, LORA = {"finetuning_type": "full"}, {"finetuning_type": "lora"}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
STREAMED = {"streaming": True, "buffer_size": 7}
PACKED = {"packing": True, "cutoff_len": 128}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "sft, lora, streamed": ({**LORA, "lora_dropout": 0.1, **STREAMED}, 1),
    "sft, full, packed": ({**FULL, **PACKED}, 1),
    "dpo, lora, accumulated": ({**LORA, **DPO, **ACCUMULATED}, 1),
    "dpo, full": ({**FULL, **DPO}, 1),
    "grpo, lora": ({**LORA, **GRPO}, 1),
    "sft, full, streamed, accumulated, two processes": ({**FULL, **STREAMED, **ACCUMULATED}, 2),
    "dpo, lora, two processes": ({**LORA, **DPO}, 2),
    "grpo, full, two processes": ({**FULL, **GRPO}, 2),
}
"""Kind -> keys and number of processes."""
PLAIN = ("sft, lora, streamed", "grpo, lora")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {
        **small_world(tmp_path_factory.mktemp("world")),
        "overwrite_output_dir": False,
        "disable_shuffling": False,
        "lr_scheduler_type": "cosine",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
    }


@pytest.mark.parametrize("kind", representatives(KINDS, *PLAIN))
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_been(world, tmp_path, kind):
    """A run that ends before its moment has come is compared, and followed by another one."""
    more, num_processes = KINDS[kind]
    keys = {**world, **more}
    whole, log = tmp_path / "whole", tmp_path / "log"
    undisturbed = killable.start({**keys, "output_dir": str(whole)}, log, num_processes)
    seconds = killable.wait(undisturbed)
    assert undisturbed.exitcode == 0, log.read_text()
    seed = os.environ.get("KILL_SEED", kind)
    print(f"KILL_SEED={seed}; undisturbed it takes {seconds:.2f} CPU seconds")
    chance, num_left = random.Random(seed), KILLS[kind not in PLAIN]
    for attempt in count():
        out, before, has_ended = tmp_path / f"out {attempt}", -1, False
        while not has_ended:
            log.unlink(missing_ok=True)
            process = killable.start({**keys, "output_dir": str(out)}, log, num_processes)
            # Half of the time passes before the first step, so it is the larger of two moments.
            left = seconds * (1 - max(before, 0) / STEPS / 2)
            moment = max(chance.random(), chance.random()) * left if num_left else math.inf
            has_ended = killable.wait(process, moment, chance.random() / 50) < moment
            assert_resumed(log.read_text() if log.exists() else "", before)
            if not has_ended:
                num_left -= 1
                before = assert_whole(out, process.pid, before)
                print(f"killed after {moment:.2f} CPU seconds; the last step that was saved is {before}")
        assert process.exitcode == 0, log.read_text()
        assert_same_end(out, whole)
        if not num_left:
            break


def assert_resumed(said: str, saved: int) -> None:
    """A run that came so far has resumed from the last whole checkpoint, and has passed over none."""
    assert "is not used" not in said
    resumed = re.search(r"resuming from .*/checkpoint-(\d+)", said)
    if resumed:
        assert int(resumed[1]) == saved
    else:
        assert saved == -1 or "step " not in said, f"trained from scratch:\n{said}"


def assert_whole(out: Path, pid: int | None, before: int) -> int:
    """The last step saved, which is none before `before`. What earlier runs left is gone once this one has saved."""
    newest = newest_whole(out) if out.exists() else None
    step = -1 if newest is None else step_of(newest)
    assert step >= before
    assert newest is None or all(verify_folder(folder) == [] for folder in checkpoints_in(out))
    if newest is not None and step > before:
        left = [path.name for path in out.iterdir() if is_draft(path.name) and f".{pid}." not in path.name]
        assert not left
    return step


def assert_same_end(out: Path, whole: Path) -> None:
    (weights,) = [*whole.glob("model.safetensors"), *whole.glob("adapter_model.safetensors")]
    expected, found = load_file(weights), load_file(out / weights.name)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    names, usual = ({path.name for path in folder.iterdir()} for folder in (out, whole))
    assert names <= usual, "nothing is left over"
    # A kill after the weights were saved costs the metrics of training, which nothing makes again.
    assert usual - names <= {"train_results.json", "all_results.json"}
    logs = [
        [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        for folder in (out, whole)
    ]
    losses, expected_losses = (
        [(line["current_steps"], line["loss"]) for line in log if "loss" in line] for log in logs
    )
    assert losses == expected_losses and len(losses) == STEPS
