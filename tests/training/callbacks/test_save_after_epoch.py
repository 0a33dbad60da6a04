"""Which checkpoints wait for the end of their epoch; `tests/runs/test_resume.py` has whole runs."""

from types import SimpleNamespace

import pytest

from luthier.training.callbacks.save_after_epoch import SaveAfterEpoch


@pytest.mark.parametrize(
    ("epoch", "step", "strategies", "waits"),
    [
        (2.0, 8, ("epoch", "no"), True),
        (2.0, 8, ("steps", "epoch"), True),
        (2.0, 8, ("steps", "steps"), False),
        (1.75, 7, ("epoch", "epoch"), False),
        (2.5, 10, ("epoch", "epoch"), True),
    ],
    ids=["line", "evaluation", "by steps", "within an epoch", "last step of the run"],
)
@pytest.mark.parametrize("asked", [True, False])
def test_it_waits_for_what_the_epoch_ends_with(epoch, step, strategies, waits, asked):
    args = SimpleNamespace(logging_strategy=strategies[0], eval_strategy=strategies[1])
    state, control = SimpleNamespace(epoch=epoch, global_step=step, max_steps=10), SimpleNamespace(should_save=asked)
    callback = SaveAfterEpoch()
    callback.on_step_end(args, state, control)
    assert control.should_save == (asked and not waits)
    control.should_save = False  # by the save
    callback.on_epoch_end(args, state, control)
    assert control.should_save == (asked and waits)
    control.should_save = False
    callback.on_epoch_end(args, state, control)
    assert not control.should_save
