"""A plot has its two ends, whatever `logging_steps` is."""

from types import SimpleNamespace

import pytest

from luthier.training.callbacks.plot_ends import PlotEnds


@pytest.mark.parametrize(
    ("stops_early", "step", "stop", "evaluate", "logs"),
    [
        (False, 1, False, False, True),
        (False, 2, False, False, False),
        (False, 2, True, False, True),
        (False, 2, False, True, False),
        (True, 2, False, True, True),
    ],
)
def test_which_steps_are_logged(stops_early, step, stop, evaluate, logs):
    control = SimpleNamespace(should_log=False, should_training_stop=stop, should_evaluate=evaluate)
    PlotEnds(stops_early=stops_early).on_step_end(None, SimpleNamespace(global_step=step), control)
    assert control.should_log is logs


@pytest.mark.parametrize("stops_early", [False, True])
def test_an_evaluation_at_the_end_of_an_epoch_is_logged_if_it_may_stop_the_run(stops_early):
    control = SimpleNamespace(should_log=False, should_training_stop=False, should_evaluate=True)
    PlotEnds(stops_early=stops_early).on_epoch_end(None, SimpleNamespace(global_step=5), control)
    assert control.should_log is stops_early


def test_a_step_that_is_logged_anyway_stays_logged():
    control = SimpleNamespace(should_log=True, should_training_stop=False, should_evaluate=False)
    PlotEnds(stops_early=False).on_step_end(None, SimpleNamespace(global_step=2), control)
    assert control.should_log
