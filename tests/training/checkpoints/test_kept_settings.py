"""A resumed run says which of its settings the checkpoint has replaced. `tests/runs/test_resume.py` has whole runs."""

import pytest
import torch

from luthier.training.checkpoints.kept_settings import telling_kept_settings


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr("luthier.training.checkpoints.kept_settings.warn", messages.append)
    return messages


def adam(**settings):
    """As after the schedule has been built: `initial_lr` is the learning rate of the run file."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **settings)
    optimizer.param_groups[0]["initial_lr"] = settings.get("lr", 1e-3)
    return optimizer


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lr": 1e-5}, ["learning_rate: 1e-05: is not followed", "with 0.001"]),
        ({"weight_decay": 0.5}, ["weight_decay: 0.5: is not followed"]),
        ({"betas": (0.5, 0.6)}, ["adam_beta1, adam_beta2: (0.5, 0.6): is not followed"]),
        ({"eps": 1e-3}, ["adam_epsilon: 0.001: is not followed"]),
        ({}, []),
    ],
)
def test_a_replaced_setting_is_told(warnings, changed, told):
    optimizer = adam(**changed)
    with telling_kept_settings(optimizer, "out/checkpoint-4"):
        optimizer.load_state_dict(adam().state_dict())
    assert len(warnings) == bool(told)
    assert all(text in warnings[0] for text in told)


def test_without_a_checkpoint_nothing_is_told(warnings):
    optimizer = adam()
    with telling_kept_settings(optimizer, None):
        optimizer.param_groups[0]["initial_lr"] = 1.0
    assert warnings == []


def test_the_state_of_another_optimizer_is_refused(warnings):
    """torch takes over its settings, and fails in the first step that looks for one of its own."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with (
        pytest.raises(ValueError, match=r"mismatch of the optimizer: another one .* without .*momentum"),
        telling_kept_settings(sgd, "out/checkpoint-4"),
    ):
        sgd.load_state_dict(adam().state_dict())


def test_a_state_of_another_schedule_is_taken(warnings):
    """Such as reduce_lr_on_plateau, which does not add `initial_lr`."""
    optimizer, saved = adam(), adam()
    del saved.param_groups[0]["initial_lr"]
    with telling_kept_settings(optimizer, "out/checkpoint-4"):
        optimizer.load_state_dict(saved.state_dict())
    assert warnings == []
