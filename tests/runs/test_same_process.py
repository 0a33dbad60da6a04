"""A run learns the same bits whatever ran before it in the process: libraries keep state, and patches must go."""

from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.core.errors import LuthierError
from tests.matrix import representatives
from tests.small_world import WAYS, small_world

BEFORE: dict[str, dict[str, Any]] = {
    "8 bits": {**WAYS["full"], "optim": "adamw_8bit"},
    "quantized": WAYS["qlora"],
    "GaLore": {**WAYS["full"], "use_galore": True},
    "BAdam": {**WAYS["full"], "use_badam": True},
    "deterministic": {**WAYS["lora"], "full_determinism": True},
    "16 bits": {**WAYS["full"], "pure_bf16": True},
    "noise": {**WAYS["lora"], "neftune_noise_alpha": 5},
    "stream": {**WAYS["lora"], "streaming": True},
    "scores": {**WAYS["lora"], "stage": "rm", "dataset": "pairs"},
    "depths": {**WAYS["full"], "mixture_of_depths": "convert"},
    "shifted": {**WAYS["lora"], "shift_attn": True},
    "plain": {**WAYS["lora"], "fast_path": False},
    "compiled": {**WAYS["lora"], "torch_compile": True},
    "workers": {**WAYS["lora"], "dataloader_num_workers": 1},
    "failing": {**WAYS["lora"], "learning_rate": 1e38},
}
RUNS: tuple[dict[str, Any], ...] = (WAYS["lora"], {**WAYS["full"], "bf16": True}, WAYS["qlora"])


def learned(world: dict[str, Any], folder: Path, keys: dict[str, Any]) -> bytes:
    luthier.train({**world, **keys, "max_steps": 2, "output_dir": str(folder)})
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*model.safetensors")))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    return [learned(world, tmp_path_factory.mktemp("first"), keys) for keys in RUNS]


@pytest.mark.parametrize("before", representatives(BEFORE, "8 bits", "shifted"))
def test_a_run_is_the_same_after_another_one(world, first, tmp_path, before):
    try:
        learned(world, tmp_path / "before", BEFORE[before])
    except LuthierError:
        assert before == "failing"
    assert [learned(world, tmp_path / str(number), keys) for number, keys in enumerate(RUNS)] == first
