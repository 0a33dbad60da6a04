"""What a message says about its share in the loss, in the words of each tool, and what nobody can understand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.data.formats._learned import loss_of
from luthier.data.training_keys import training_keys
from luthier.data.types import Span

PLACE = "message 2"


def loss(message, content="abcdef", role="assistant"):
    return loss_of({"content": content, "role": role, **message}, content, role, PLACE)


@pytest.mark.parametrize(
    ("message", "weight"),
    [
        ({}, None),
        *[({key: None}, None) for key in ("loss", "train", "weight", "masked", "loss_mask", "train_detail")],
        *[({"loss": value}, float(value)) for value in (True, False, 0, 1, 0.25)],
        *[({"weight": value}, float(value)) for value in (0, 1, 0.5)],
        *[({"loss_weight": value}, float(value)) for value in (0, 1.0)],
        *[({"loss_scale": value}, float(value)) for value in (0.0, 0.3)],
        *[
            ({key: v}, float(v))
            for key in ("train", "trainable", "loss_mask", "step_loss_mask")
            for v in (True, False, 1, 0)
        ],
        *[({"masked": value}, float(not value)) for value in (True, False, 1, 0)],
        ({"Train": False}, 0.0),
        ({"train": False, "weight": 0, "masked": True}, 0.0),
        ({"train": False, "loss": None}, 0.0),
        ({"weight_kg": 3, "training_data": "x", "name": "f", "weightless": True, "maskottchen": "y"}, None),
    ],
)
def test_the_words_of_each_tool(message, weight):
    assert loss(message) == weight


def test_spans_of_this_project_and_of_axolotl():
    """The end of a span is the first character behind it; that of a detail is its last character."""
    assert loss({"loss": [[0, 2, 0], [2, 6, 0.5]]}) == (Span(0, 2, 0.0), Span(2, 6, 0.5))
    details = [
        {"begin_offset": 0, "end_offset": 1, "train": False},
        {"begin_offset": 2, "end_offset": 5, "train": True},
    ]
    assert loss({"train_detail": details}) == (Span(0, 2, 0.0), Span(2, 6, 1.0))
    assert loss({"train_detail": []}) is None


@pytest.mark.parametrize("role", ["user", "system", "observation"])
def test_a_weight_is_defined_for_answers_only(role):
    assert loss({"weight": 1}, role=role) is None
    assert loss({"train": True}, role=role) == 1.0


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"loss": "yes"}, "'loss' of message 2 is text, not a number"),
        ({"loss": math.nan}, "'loss' of message 2 is nan, not from 0 to 1"),
        ({"weight": 2}, "'weight' of message 2 is 2, not from 0 to 1"),
        ({"train": "no"}, "'train' of message 2 is text, not true, false, 1 or 0"),
        ({"train": 0.5}, "'train' of message 2 is a number, not true, false, 1 or 0"),
        ({"masked": []}, "'masked' of message 2 is a list, not true, false, 1 or 0"),
        ({"train_detail": {}}, "'train_detail' of message 2 is an object, not a list"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1}]},
            "part 1 of 'train_detail' of message 2 is an object, not an object with begin_offset, end_offset, train",
        ),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 6, "train": True}]},
            "part 1 of 'train_detail' of message 2: 0 to 7 is not part of a text of 6 characters",
        ),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": "1", "train": True}]},
            "part 1 of 'train_detail' of message 2: start and end must be whole numbers",
        ),
        (
            {"train": True, "weight": 0},
            "'train' and 'weight' of message 2 disagree about what is learned -> keep one of them",
        ),
        *[
            (
                {key: value},
                f"{key!r} of message 2 looks like a say in what is learned, and is not understood "
                "-> use 'loss', a number from 0 to 1, or remove it",
            )
            for key, value in {
                "mask": True,
                "ignore_loss": True,
                "noLoss": 1,
                "is_trained": False,
                "weights": [1, 0],
            }.items()
        ],
    ],
)
def test_what_cannot_be_understood_is_refused(message, reason):
    with pytest.raises(RowError) as caught:
        loss(message)
    assert str(caught.value) == reason


@given(st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.floats() | st.text(max_size=3), max_size=4))
def test_any_message_has_a_weight_or_a_reason(message):
    """A key that says something about training is never ignored."""
    try:
        found = loss_of(message, "", "assistant", PLACE)
    except RowError:
        assert set(training_keys(message))
    else:
        assert (found is None) is (not set(training_keys(message)))
