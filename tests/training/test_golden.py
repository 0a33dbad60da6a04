"""Twenty steps of every stage give the losses written down in `golden/`, with all weights learning and with LoRA.

Made on one kind of machine the numbers are equal bit for bit, on another to 1e-5; answers that are drawn at random may
there be other ones after the first step. Whoever changes the numbers on
purpose writes them anew with `LUTHIER_WRITE_GOLDEN=1 python -m pytest tests/training/test_golden.py` and says why.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from tests.tiny import tiny_llama
from tests.training.runs import losses, small_world

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = {
    "max_new_tokens": 6,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "per_device_train_batch_size": 8,
    "reward_funcs": "tests.training.runs:small_letters",
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
    """What decides how numbers are rounded."""
    return f"{torch.__version__.split('+')[0]} {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    teacher = tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7, max_position_embeddings=1024)
    return {**values, "teacher_model": str(teacher), "learning_rate": 1e-3, "max_steps": NUM_STEPS}


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_those_written_down(world, tmp_path, name):
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
    elif not draws_answers:
        assert found == pytest.approx(golden["losses"], abs=1e-5)
