"""The optimizer of split layers in checkpoints; tests/runs/test_tensor_parallel.py resumes from them."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from luthier.core.errors import OutputError
from luthier.training.checkpoints.split_state import (
    SPLIT_OPTIMIZER,
    WHOLE_OPTIMIZER,
    load_optimizer,
    require_same_split,
    save_optimizer,
)
from tests.split_layer import split_layer


@pytest.mark.parametrize(
    ("name", "is_split", "message"),
    [
        (SPLIT_OPTIMIZER, False, "it was saved with tp_size, and this run does not split layers -> set tp_size"),
        (WHOLE_OPTIMIZER, True, "it was saved without tp_size -> leave tp_size out"),
    ],
)
def test_the_other_kind_of_optimizer_is_refused(tmp_path, name, is_split, message):
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match=message):
        require_same_split(tmp_path, is_split=is_split)
    require_same_split(tmp_path, is_split=not is_split)


@pytest.mark.parametrize("is_split", [False, True])
def test_weights_alone_suit_both(tmp_path, is_split):
    (tmp_path / "model.safetensors").touch()
    require_same_split(tmp_path, is_split=is_split)


def stepped(layer: nn.Module) -> torch.optim.Optimizer:
    """After one step with gradients of one."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for weight in layer.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_each_process_gets_its_part_of_a_whole_state(tmp_path):
    whole = stepped(nn.Linear(6, 4, bias=False))
    means = torch.arange(24.0).reshape(4, 6)
    whole.state_dict()["state"][0]["exp_avg"].copy_(means)
    save_optimizer(whole, schedule_of(whole), tmp_path, writes=True)
    with split_layer() as layer:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
        load_optimizer(optimizer, schedule_of(optimizer), tmp_path)
        state = optimizer.state[layer.weight]
        assert isinstance(state["exp_avg"], DTensor) and state["exp_avg"].placements == layer.weight.placements
        assert torch.equal(state["exp_avg"].to_local(), means[:, :3])
        assert float(state["step"]) == 1 and optimizer.param_groups[0]["lr"] == 0.1


def test_one_process_alone_writes(tmp_path):
    optimizer = stepped(nn.Linear(6, 4))
    save_optimizer(optimizer, schedule_of(optimizer), tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    load_optimizer(optimizer, schedule_of(optimizer), tmp_path)  # which has weights alone


def test_another_number_of_trained_weights_is_a_mismatch(tmp_path):
    optimizer, other = stepped(nn.Linear(6, 4)), stepped(nn.Linear(6, 4, bias=False))
    save_optimizer(optimizer, schedule_of(optimizer), tmp_path, writes=True)
    with pytest.raises(ValueError, match="mismatch of the trained weights: 2 are saved, and the run has 1"):
        load_optimizer(other, schedule_of(other), tmp_path)
