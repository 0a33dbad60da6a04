"""Which loss is a spike."""

import pytest

from luthier.training.watch.spikes import LEAST_STEPS, WINDOW_STEPS, Spikes


def after(losses: list[float]) -> Spikes:
    spikes = Spikes()
    assert [spikes.remark(loss) for loss in losses] == [""] * len(losses)
    return spikes


@pytest.mark.parametrize(("loss", "is_told"), [(2.59, False), (2.61, True), (1.0, False)])
def test_six_standard_deviations_above_the_mean(loss, is_told):
    """16 losses of 1.9 and 2.1 have the mean 2 and the standard deviation 0.1, so the bound is 2.6."""
    remark = after([1.9, 2.1] * 8).remark(loss)
    assert remark == ("the loss rose to 2.61, after 2 ± 0.1 in the 16 steps before" if is_told else "")


def test_too_few_steps_say_nothing():
    assert after([1.9, 2.1] * 8)._losses.__len__() == LEAST_STEPS
    assert after([1.9, 2.1] * 7).remark(100.0) == ""


def test_a_loss_that_stays_high_is_told_once():
    spikes = after([1.9, 2.1] * 8)
    assert spikes.remark(3.0)
    assert not spikes.remark(3.0)


def test_old_losses_are_forgotten():
    """A high loss before the window hides no spike."""
    spikes = after([9.0, *[1.9, 2.1] * (WINDOW_STEPS // 2)])
    assert spikes.remark(3.0)
