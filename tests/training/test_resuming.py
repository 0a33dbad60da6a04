"""What a trainer reads from checkpoints; tests/runs/test_resume.py and test_killed.py resume whole runs."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests.small_world import small_world
from tests.training.test_checkpointed import ADAPTER, BEST, KEYS


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), **KEYS}


@pytest.mark.parametrize("finetuning_type", ["lora", "oft"])
def test_the_best_adapter_keeps_its_format(world, tmp_path, finetuning_type):
    adapter = {"oft_block_size": 16} if finetuning_type == "oft" else {}
    keys = {**BEST, "finetuning_type": finetuning_type, **adapter, "pure_bf16": True, "additional_target": "norm"}
    result = luthier.train({**world, **keys, "output_dir": str(tmp_path / "out")})
    steps = {logs["step"]: logs["eval_loss"] for logs in result.log_history if "eval_loss" in logs}
    best = load_file(tmp_path / "out" / f"checkpoint-{min(steps, key=steps.__getitem__)}" / ADAPTER)
    final = load_file(tmp_path / "out" / ADAPTER)
    assert {weight.dtype for weight in final.values()} == {torch.bfloat16}
    assert all(torch.equal(final[name], best[name]) for name in best) and final.keys() == best.keys()
