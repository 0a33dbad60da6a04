"""The learning rates of a resumed run at its first step.

The optimizer of a checkpoint holds the rates of the run that saved it, until the schedule steps. After 8 of 8 steps
they are 0; after 8 of 12 they are not. The schedule knows how many steps were taken, so it gives the rates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


def follow_schedule(schedule: Any) -> None:
    """Set the rates of the optimizer to those of a schedule that was loaded, if it is a function of the step.

    A run with the settings of the checkpoint has them already, to the bit.
    """
    if not isinstance(schedule, LambdaLR):
        return
    step = schedule.last_epoch
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    if rates == schedule.get_last_lr():
        return
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})


@contextmanager
def keeping_rates(optimizer: Any, schedule: Any) -> Iterator[None]:
    """A context in which both are loaded from a checkpoint. Afterwards rates and schedule are as they were before."""
    state, rates = schedule.state_dict(), [group["lr"] for group in optimizer.param_groups]
    yield
    schedule.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
