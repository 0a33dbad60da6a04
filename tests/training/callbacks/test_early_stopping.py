"""The count of evaluations that were not better is that of the checkpoint."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from luthier.training.callbacks.early_stopping import EarlyStoppingCallback

ARGS = SimpleNamespace(
    load_best_model_at_end=True,
    metric_for_best_model="loss",
    greater_is_better=False,
    eval_strategy=IntervalStrategy.STEPS,
)
NAME = "EarlyStoppingCallback"


def saved(count: Any) -> dict[str, Any]:
    return {NAME: {"args": {}, "attributes": {"early_stopping_patience_counter": count}}}


@pytest.mark.parametrize(
    ("callbacks", "step", "count", "stops"),
    [
        ({}, 0, 0, False),
        (saved(0), 4, 0, False),
        (saved(1), 4, 1, False),
        (saved(2), 4, 2, True),
        (saved(3), 4, 3, True),
        (saved(2), 8, 2, False),  # the last step, so there is nothing to tell
        (saved(2), 0, 0, False),  # of no checkpoint
        (saved("2"), 4, 0, False),
        ({NAME: []}, 4, 0, False),
        ({}, 4, 0, False),  # of a run without the key
    ],
)
def test_a_resumed_run_counts_on(callbacks, step, count, stops):
    state = TrainerState(global_step=step, max_steps=8, stateful_callbacks=dict(callbacks))
    callback, control = EarlyStoppingCallback(early_stopping_patience=2), TrainerControl()
    callback.on_train_begin(ARGS, state, control)
    assert callback.early_stopping_patience_counter == count
    assert control.should_training_stop == stops
    assert state.stateful_callbacks[NAME] == callback.state(), "the next checkpoint can replace it"
