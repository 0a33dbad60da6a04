"""Whole runs with each optimizer: the loss falls, the schedule acts, and a resumed run equals an uninterrupted one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests.matrix import representatives
from tests.small_world import losses, small_world

LORA = {"finetuning_type": "lora"}
RUNS: dict[str, dict[str, Any]] = {
    "loraplus": {**LORA, "loraplus_lr_ratio": 4.0},
    "muon": {"use_muon": True},
    "muon with lora": {**LORA, "use_muon": True},
    "adam_mini": {"use_adam_mini": True},
    "adam_mini in bf16": {"use_adam_mini": True, "pure_bf16": True},
    "galore": {"use_galore": True, "galore_rank": 4, "galore_update_interval": 3, "pure_bf16": True},
    "galore layerwise": {"use_galore": True, "galore_rank": 4, "galore_update_interval": 3, "galore_layerwise": True},
    "apollo": {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 3},
    "apollo layerwise": {"use_apollo": True, "apollo_rank": 4, "apollo_layerwise": True, "pure_bf16": True},
    "badam": {"use_badam": True, "badam_switch_interval": 3, "bf16": True},
    "badam ratio": {"use_badam": True, "badam_mode": "ratio", "badam_update_ratio": 0.5, "badam_switch_interval": 3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {
        **small_world(tmp_path_factory.mktemp("world")),
        "overwrite_output_dir": False,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
    }


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "name", representatives(RUNS, "loraplus", "muon", "adam_mini", "galore", "apollo layerwise", "badam")
)
def test_a_run_learns_and_resumes_bit_for_bit(world, tmp_path, name):
    whole, part = tmp_path / "whole", tmp_path / "part"
    values = {**world, **RUNS[name]}
    result = luthier.train({**values, "output_dir": str(whole)})
    assert losses(result)[-1] < losses(result)[0] - 0.1
    part.mkdir()
    shutil.copytree(whole / "checkpoint-4", part / "checkpoint-4")
    again = luthier.train({**values, "output_dir": str(part)})
    assert losses(again) == losses(result)
    expected = final_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(part).items())
