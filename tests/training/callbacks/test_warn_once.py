"""What keeps a run from learning is told once, and not where it may be chance."""

from types import SimpleNamespace

import pytest

from luthier.training.callbacks.warn_once import WarnOnce

TOLD = "warning: step {}: no spread"


@pytest.mark.parametrize(
    ("spreads", "told"),
    [
        ([0] * 9, [5]),
        ([1, 0, 0, 0, 0], []),
        ([1, 0, 0, 0, 0, 0, 1, *[0] * 5], [6]),
        ([0, 0], [2]),
        ([0, 1], []),
        ([], []),
    ],
)
def test_it_is_told_after_several_lines_or_if_there_are_no_others(said, spreads, told):
    callback = WarnOnce(lambda means: "" if means["spread"] else "no spread")
    for step, spread in enumerate(spreads, start=1):
        for logs in ({"loss": 1.0, "spread": spread}, {"eval_loss": 1.0}):
            callback.on_log(None, SimpleNamespace(global_step=step), None, logs)
    callback.on_train_end(None, SimpleNamespace(global_step=len(spreads)), None)
    assert said == [TOLD.format(step) for step in told]
