"""A resumed run that would take other rows is told so. Whole runs are in `tests/runs/test_resume.py`."""

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.training.checkpoints.row_order import KEY, NoteOrder, order_of
from tests.small_world import WAYS, small_world

ORDER = {"num_generations": 1, "rows of a step": 8, "seed": 1, "train_sampling_strategy": "random"}


def begun(
    order: dict[str, Any], before: Any = None, step: int = 2, last: int = 4, *, ignores: bool = False
) -> dict[str, Any]:
    state = SimpleNamespace(
        global_step=step, max_steps=last, stateful_callbacks={} if before is None else {KEY: before}
    )
    NoteOrder(order).on_train_begin(SimpleNamespace(ignore_data_skip=ignores), state, None)
    return state.stateful_callbacks


@pytest.mark.parametrize("before", [None, ORDER, "damaged"])
def test_the_same_order_and_an_unknown_one_go_on(before, said):
    assert begun(ORDER, before)[KEY] == ORDER and not said


def test_another_order_is_told_and_noted(said):
    assert begun({**ORDER, "rows of a step": 4, "seed": 2}, ORDER)[KEY]["seed"] == 2
    assert said == [
        "warning: the checkpoint of step 2 took its rows in other steps or in another order (rows of a step: 8 there, 4"
        " here; seed: 1 there, 2 here), so training repeats some rows of this epoch and leaves others out"
    ]


def test_a_run_that_skips_no_rows_begins_its_epoch_again(said):
    assert begun({**ORDER, "seed": 2}, ORDER, ignores=True)[KEY]["seed"] == 2 and not said


def test_a_first_step_and_a_finished_run_have_nothing_to_repeat(said):
    begun({**ORDER, "seed": 2}, ORDER, step=0)
    assert begun({**ORDER, "seed": 2}, ORDER, step=4)[KEY] == ORDER and not said


def test_the_same_rows_of_a_step_in_other_micro_batches_or_processes_are_the_same_order(tmp_path):
    values = {**small_world(tmp_path), **WAYS["lora"], "output_dir": str(tmp_path / "out"), "seed": 3}
    values["disable_shuffling"] = False

    def order(world_size: int = 1, **keys: Any) -> dict[str, Any]:
        return order_of(load_train({**values, **keys}), world_size)

    first = order(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert first == {**ORDER, "seed": 3, "train_sampling_strategy": "random"}
    assert first == order(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert first == order(2, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert first == order(2, per_device_train_batch_size=4, gradient_accumulation_steps=2, tp_size=2)
    assert order(data_seed=7)["seed"] == 7
    unshuffled = order(disable_shuffling=True)
    assert (unshuffled["seed"], unshuffled["train_sampling_strategy"]) == (None, "sequential")
