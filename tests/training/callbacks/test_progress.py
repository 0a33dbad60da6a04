"""The line that a user sees while training: loss, the headline of the stage, learning rate, speed."""

import pytest

from luthier.core.kinds import STAGES
from luthier.training.callbacks.progress import numbers_of

LOGS = {"loss": 0.5, "learning_rate": 1e-4, "throughput": 512.4, "reward": 0.8125, "other": 3.0}


def test_the_headline_is_shown_next_to_the_loss():
    assert numbers_of(LOGS, ("reward",)) == "loss 0.5000  reward 0.8125  lr 1.00e-04  512 tokens/s"
    assert numbers_of(LOGS) == "loss 0.5000  lr 1.00e-04  512 tokens/s"


def test_a_loss_of_nothing_has_no_sign():
    assert numbers_of({"loss": -1e-9}) == "loss 0.0000"


def test_an_evaluation_shows_its_own():
    assert (
        numbers_of({"eval_loss": 1.0, "eval_accuracy": 0.75}, ("accuracy",)) == "eval_loss 1.0000  eval_accuracy 0.7500"
    )


@pytest.mark.parametrize(("stage", "first"), [("grpo", "reward"), ("dpo", "rewards/accuracies"), ("rm", "accuracy")])
def test_the_headline_of_a_stage(stage, first):
    assert STAGES.get(stage).reporting.headline[0] == first


def test_each_of_several_evaluation_sets_is_shown():
    logs = {"eval_tools_loss": 0.5, "eval_tools_accuracy": 1.0, "eval_tools_runtime": 0.1, "epoch": 1.0}
    assert numbers_of(logs, ("accuracy",)) == "eval_tools_loss 0.5000  eval_tools_accuracy 1.0000"
