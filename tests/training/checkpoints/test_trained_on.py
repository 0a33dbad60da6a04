"""What a checkpoint says about the rows that it was trained on. Whole runs are in `tests/runs/test_resume.py`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.core.errors import OutputError
from luthier.training.checkpoints.trained_on import KEY, NoteRows, TrainedOn, trained_on

A = {"rows": "a", "num_rows": 4, "keys": {"dataset": "one"}}
B = {"rows": "b", "num_rows": 4, "keys": {"dataset": "two"}}
C = {"rows": "c", "num_rows": 5, "keys": {"dataset": "two"}}
CHECKPOINT = Path("out/checkpoint-4")


def test_the_same_rows_and_an_unknown_past_are_fine():
    for rows in (TrainedOn(A), TrainedOn(A, [A], CHECKPOINT)):
        rows.require_same()
        assert not rows.differences
    assert TrainedOn(A).entries(0) == [{**A, "from_step": 0}]
    assert TrainedOn(A, [{**A, "from_step": 0}], CHECKPOINT).entries(4) == [{**A, "from_step": 0}]


def test_other_rows_are_refused_with_what_differs():
    with pytest.raises(OutputError, match=r"checkpoint-4 was trained on other data .*dataset: one there, two here"):
        TrainedOn(B, [A], CHECKPOINT).require_same()
    with pytest.raises(OutputError, match="4 rows there, 5 here"):
        TrainedOn(C, [B], CHECKPOINT).require_same()


def test_the_latest_rows_count():
    history = [{**A, "from_step": 0}, {**B, "from_step": 4}]
    TrainedOn(B, history, CHECKPOINT).require_same()
    with pytest.raises(OutputError):
        TrainedOn(A, history, CHECKPOINT).require_same()
    assert TrainedOn(C, history, CHECKPOINT, is_named=True).entries(8) == [*history, {**C, "from_step": 8}]


def test_a_named_checkpoint_and_another_day_are_warnings(said):
    TrainedOn(B, [A], CHECKPOINT, is_named=True).require_same()
    TrainedOn({**A, "rows": "x"}, [A], CHECKPOINT, is_dated=True).require_same()
    assert len([text for text in said if "was trained on other data" in text]) == 2
    with pytest.raises(OutputError):
        TrainedOn(B, [A], CHECKPOINT, is_dated=True).require_same()


def test_the_state_names_the_rows_only_if_there_are_steps_to_go():
    going = SimpleNamespace(global_step=4, max_steps=8, stateful_callbacks={})
    NoteRows(TrainedOn(A)).on_train_begin(None, going, None)
    assert going.stateful_callbacks[KEY] == [{**A, "from_step": 4}]
    finished = SimpleNamespace(global_step=8, max_steps=8, stateful_callbacks={KEY: [A]})
    NoteRows(TrainedOn(B, [A], CHECKPOINT)).on_train_begin(None, finished, None)
    assert finished.stateful_callbacks[KEY] == [A]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"stateful_callbacks": {"trained_on": [1]}}'])
def test_a_checkpoint_that_does_not_say(tmp_path, content):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert trained_on(tmp_path) == []


def test_a_checkpoint_that_says(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {KEY: [A, B]}}))
    assert trained_on(tmp_path) == [A, B]
