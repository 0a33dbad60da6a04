"""Twenty steps of every stage give the losses in `golden/`, with full training and with LoRA.

On the kind of machine that wrote them the numbers are equal bit for bit, on another one to 1e-5. Where answers are
sampled, the sampled token can differ by rounding, so only the first rollout is compared. To change the numbers on
purpose, run `LUTHIER_WRITE_GOLDEN=1 python -m pytest tests/runs/test_golden.py` and say why.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from tests.matrix import representatives
from tests.small_world import losses, small_world
from tests.tiny import tiny_llama

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = {
    "max_new_tokens": 6,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "per_device_train_batch_size": 8,
    "reward_funcs": "tests.small_world:small_letters",
}
RUNS = {
    f"{stage}_{finetuning_type}": {"stage": stage, "finetuning_type": finetuning_type, **keys}
    for stage, keys in (
        ("pt", {"dataset": "plain", "cutoff_len": 96}),
        ("sft", {}),
        ("gkd", {}),
        ("dpo", {"dataset": "pairs"}),
        ("kto", {"dataset": "feedback"}),
        ("rm", {"dataset": "pairs"}),
        ("ppo", {**ANSWERS, "ppo_epochs": 2}),
        ("grpo", {**ANSWERS, "num_generations": 4, "num_iterations": 2, "grpo_beta": 0.1}),
    )
    for finetuning_type in ("full", "lora")
}
NUM_STEPS = 20


def machine() -> str:
    """What decides how numbers are rounded: torch, and the very processor, for which kernels are chosen."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        first, _, _ = cpuinfo.read_text(encoding="utf-8").partition("\n\n")
        facts = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
        processor = " ".join(facts.get(name, "?") for name in ("vendor_id", "cpu family", "model", "stepping"))
    return f"torch {torch.__version__.split('+')[0]}, {processor}, {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    teacher = tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7, max_position_embeddings=1024)
    return {**values, "teacher_model": str(teacher), "learning_rate": 1e-3, "max_steps": NUM_STEPS}


SOME = ("sft_full", *(name for name in RUNS if name.endswith("_lora")))


@pytest.mark.parametrize("name", representatives(RUNS, *SOME))
def test_losses_equal_the_golden_losses(world, tmp_path, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = losses(luthier.train({**world, **RUNS[name], "output_dir": str(tmp_path / "out")}))
    finally:
        torch.set_num_threads(threads)
    path = GOLDEN / f"{name}.json"
    if os.environ.get("LUTHIER_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "losses": found}, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(path.read_text(encoding="utf-8"))
    draws_answers = "reward_funcs" in RUNS[name]
    assert len(found) == NUM_STEPS and (draws_answers or found[-1] < found[0])
    if golden["machine"] == machine():
        assert found == golden["losses"]
    num_compared = 2 if draws_answers else NUM_STEPS
    assert found[:num_compared] == pytest.approx(golden["losses"][:num_compared], abs=1e-5)
