"""The average of a schedule-free optimizer is what is evaluated and saved."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.training.averaged import averaged, leave_averaged


class ScheduleFree:
    """As the optimizers of the library `schedulefree` switch between their two points."""

    def __init__(self, *, trains: bool = True) -> None:
        self.param_groups: list[dict[str, Any]] = [{"train_mode": trains}]

    def eval(self) -> None:
        self.param_groups[0]["train_mode"] = False

    def train(self) -> None:
        self.param_groups[0]["train_mode"] = True


def test_the_average_is_there_inside_and_the_steps_go_on_afterwards():
    optimizer = ScheduleFree()
    with pytest.raises(ZeroDivisionError), averaged(optimizer):
        assert not optimizer.param_groups[0]["train_mode"]
        1 / 0  # noqa: B018
    assert optimizer.param_groups[0]["train_mode"]


def test_what_is_averaged_already_stays_so():
    optimizer = ScheduleFree()
    leave_averaged(optimizer)
    for _ in range(2):
        with averaged(optimizer):
            assert not optimizer.param_groups[0]["train_mode"]
        assert not optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD([torch.ones(1)], lr=0.1), SimpleNamespace()])
def test_other_optimizers_have_one_point(optimizer):
    with averaged(optimizer):
        leave_averaged(optimizer)
