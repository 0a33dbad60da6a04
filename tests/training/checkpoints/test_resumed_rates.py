"""The first rate of a resumed run is that of its own schedule. `tests/runs/test_resume.py` has whole runs."""

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler

from luthier.training.checkpoints.resumed_rates import follow_schedule, keeping_rates


def at_step(step: int, num_steps: int, name: str = "cosine", rate: float = 0.1):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "lr": rate * (n + 1)} for n, weight in enumerate(weights)])
    schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=num_steps)
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "constant_with_warmup"])
@pytest.mark.parametrize(("step", "saved_steps", "num_steps"), [(8, 8, 12), (4, 8, 12), (4, 12, 8)])
def test_the_rate_is_that_of_the_new_schedule(name, step, saved_steps, num_steps):
    saved = at_step(step, saved_steps, name)
    whole = at_step(step, num_steps, name)
    resumed = at_step(0, num_steps, name)
    for one, other in zip(resumed, saved, strict=True):
        one.load_state_dict(other.state_dict())
    follow_schedule(resumed[1])
    assert rates(resumed[0]) == resumed[1].get_last_lr() == rates(whole[0])
    for optimizer, schedule in (resumed, whole):
        optimizer.step()
        schedule.step()
    assert rates(resumed[0]) == rates(whole[0])


def test_rates_in_tensors_stay_in_them():
    optimizer, schedule = at_step(0, 12)
    held = torch.tensor(0.5)
    optimizer.param_groups[0]["lr"] = held
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 3})
    follow_schedule(schedule)
    assert optimizer.param_groups[0]["lr"] is held and held.item() == pytest.approx(schedule.get_last_lr()[0])


def test_the_same_settings_change_nothing():
    optimizer, schedule = at_step(5, 12)
    optimizer.param_groups[0]["lr"] = 7.0
    follow_schedule(schedule)
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_a_schedule_that_follows_the_loss_keeps_its_rate():
    optimizer, _ = at_step(0, 12)
    before = rates(optimizer)
    follow_schedule(ReduceLROnPlateau(optimizer))
    assert rates(optimizer) == before


def test_going_back_keeps_rates_and_schedule():
    optimizer, schedule = at_step(6, 12)
    older = at_step(3, 12)
    before, state = rates(optimizer), schedule.state_dict()
    with keeping_rates(optimizer, schedule):
        optimizer.load_state_dict(older[0].state_dict())
        schedule.load_state_dict(older[1].state_dict())
        assert rates(optimizer) != before
    assert rates(optimizer) == before and schedule.state_dict() == state
