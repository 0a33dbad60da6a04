"""Out of memory in a step: the run ends with the weights that it has with enough memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import luthier
from luthier.core.errors import DeviceFailed, RunFailed
from luthier.training.cut_batches import KeepsRows, cut, num_rows
from luthier.training.trainer import StageTrainer
from tests.broken_cuda import ASSERTION, break_cuda
from tests.matrix import representatives
from tests.small_world import small_world

KEYS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
}
"""SGD, since AdamW makes a step of the smallest gradient, which is rounding."""
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora": {"finetuning_type": "lora", "lora_rank": 4},
    "padded": {"flash_attn": "disabled"},
    "packed": {"packing": True, "cutoff_len": 128},
    "checkpointed": {"disable_gradient_checkpointing": False},
    "dpo": {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.3},
    "orpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"},
    "kto": {"stage": "kto", "dataset": "feedback"},
    "rm": {"stage": "rm", "dataset": "pairs"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), **KEYS}


@pytest.fixture
def memory_for(monkeypatch) -> Callable[..., list[int]]:
    """Lets a pass over more than so many rows fail; returns the numbers of rows of the passes that did not."""
    loss = StageTrainer.compute_loss

    def limit(most: int, *, in_backward: bool = False) -> list[int]:
        passes: list[int] = []

        def refuse(*_: Any) -> None:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2.00 GiB")

        def limited(trainer: StageTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows, first = num_rows(inputs), next(weight for weight in model.parameters() if weight.requires_grad)
            if rows > most and not in_backward:
                refuse()
            total = loss(trainer, model, inputs, *args, **kwargs)
            if rows > most:  # the gradients of the layers behind it are there already
                first.register_hook(refuse)
            else:
                first._backward_hooks = None
                passes.append(rows)
            return total

        monkeypatch.setattr(StageTrainer, "compute_loss", limited)
        return passes

    return limit


def trained(world: dict[str, Any], out: Path, **more: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    result = luthier.train({**world, "output_dir": str(out), **more})
    name = "adapter_model.safetensors" if more.get("finetuning_type") == "lora" else "model.safetensors"
    return load_file(out / name), [line for line in result.log_history if "loss" in line]


def require_same(ours: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for name, weight in expected[0].items():
        torch.testing.assert_close(ours[0][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for line, other in zip(ours[1], expected[1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert {*line} == {*other}


@pytest.mark.parametrize("method", representatives(list(METHODS), "sft", "accumulated", "dpo"))
def test_the_same_losses_and_weights(world, tmp_path, memory_for, capsys, method):
    more = METHODS[method]
    expected = trained(world, tmp_path / "enough", **more)
    passes = memory_for(1)
    require_same(trained(world, tmp_path / "short", **more), expected)
    assert len(passes) >= 6 and set(passes) == {1}
    said = capsys.readouterr().err
    size = more.get("per_device_train_batch_size", 4)
    assert f"out of memory at step 1 with {size} rows at a time; from now on {size // 2} at a time are computed" in said
    assert said.count("out of memory at step") == {4: 2, 2: 1}[size]


def test_memory_that_is_out_during_backward(world, tmp_path, memory_for):
    """Gradients of the last layers, and those of the batch before, were there already."""
    more = METHODS["accumulated"]
    expected = trained(world, tmp_path / "enough", **more)
    passes = memory_for(1, in_backward=True)
    require_same(trained(world, tmp_path / "short", **more), expected)
    assert len(passes) == 12


def test_dropout_draws_what_it_drew_before(world, tmp_path, monkeypatch):
    """A step that begins again has the random numbers of its beginning. A batch of one row stays whole."""
    more = {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.5, "max_steps": 1}
    more |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    expected = trained(world, tmp_path / "enough", **more)
    loss, totals = StageTrainer.compute_loss, []

    def fails_at_first(*args: Any, **kwargs: Any) -> Any:
        totals.append(loss(*args, **kwargs))
        if len(totals) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return totals[-1]

    monkeypatch.setattr(StageTrainer, "compute_loss", fails_at_first)
    monkeypatch.setattr(StageTrainer, "_can_cut_more", lambda trainer: True)
    require_same(trained(world, tmp_path / "short", **more), expected)
    assert [float(total) for total in totals[:2]] == [float(total) for total in totals[2:]]


def test_one_row_that_is_too_long_ends_the_run(world, tmp_path, memory_for):
    memory_for(0)
    with pytest.raises(RunFailed, match=r"^out of memory at step 0: .*2.00 GiB -> .*lower cutoff_len$"):
        trained(world, tmp_path / "out")


def test_a_failed_device_ends_the_run_with_one_sentence(world, tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        break_cuda(monkeypatch, fault)
        raise fault

    fault = torch.AcceleratorError(ASSERTION)
    monkeypatch.setattr(StageTrainer, "compute_loss", fails)
    with pytest.raises(DeviceFailed, match=r"^cuda:1 has failed .* -> start again"):
        trained(world, tmp_path / "out")


def test_weights_that_change_during_backward_cannot_begin_again(world, tmp_path, memory_for):
    memory_for(1)
    keys = {"use_galore": True, "galore_layerwise": True, "galore_target": "all", "pure_bf16": True}
    remedy = "set per_device_train_batch_size: 2 and gradient_accumulation_steps: 2, which has the same losses"
    with pytest.raises(RunFailed, match=rf"^out of memory at step 0: .* -> {remedy}$"):
        trained(world, tmp_path / "out", **keys, optim="adamw_torch", finetuning_type="full")


@pytest.mark.parametrize(("num_parts", "expected"), [(1, [5]), (2, [2, 3]), (4, [1, 1, 1, 2]), (8, [1] * 5)])
def test_parts_of_nearly_equal_size(num_parts, expected):
    collate = KeepsRows(lambda rows: {"numbers": [row["number"] for row in rows]})
    batch = collate([{"number": number} for number in range(5)])
    parts = list(cut(batch, num_parts, collate))
    assert [num_rows(part) for part in parts] == expected
    assert [number for part in parts for number in part["numbers"]] == [0, 1, 2, 3, 4]
    assert list(cut({"numbers": [1]}, num_parts, collate)) == [{"numbers": [1]}]


CHILD = """
import resource, sys
import luthier
from luthier.training.trainer import StageTrainer

step = StageTrainer.training_step

def limited(trainer, *args, **kwargs):
    if trainer.state.global_step != 0:
        return step(trainer, *args, **kwargs)
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 100_000_000, resource.RLIM_INFINITY))
    loss = step(trainer, *args, **kwargs)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return loss

StageTrainer.training_step = limited
luthier.train(sys.argv[1])
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to see the memory of a process")
def test_a_process_that_gets_no_more_memory(world, tmp_path):
    keys = {**world, "dataset": "tools", "per_device_train_batch_size": 24, "flash_attn": "disabled"}
    expected = trained(keys, tmp_path / "enough")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / "short")}))
    words = [sys.executable, "-c", CHILD, str(tmp_path / "run.yaml")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory at step 1 with 24 rows at a time; from now on 12 at a time are computed" in done.stderr
    weights = load_file(tmp_path / "short" / "model.safetensors")
    for name, weight in expected[0].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)
