"""Metrics of generated answers, worked out by hand, and the properties that every metric has."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.types import ToolCall
from luthier.evals.metrics import (
    METRIC_NAMES,
    METRICS,
    Classes,
    NotJson,
    Reply,
    class_of,
    equal_data,
    fault_of,
    measures,
    read_json,
    scores_of,
)

DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ANSWERS = ["pos", "neg", "Pos.", "pos", "neutral", "neg"]
REFERENCES = ["pos", "pos", "pos", "neg", "neg", "neg"]


def score(name, answer, reference):
    return METRICS[name](Reply(answer), Reply(reference))[name]


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("number", "So it costs $1,200.", "... #### 1200", 1),
        ("number", "12 of 13", "12", 0),
        ("number", "none", "12", 0),
        ("f1", "the cat sat", "the dog sat down", 4 / 7),  # 2 words in common, 3 and 4 words
        ("f1", "a a b", "a b b", 2 / 3),  # a bag: one a and one b in common
        ("f1", "The CAT!", "the cat", 1),
        ("f1", "东京", "京都", 1 / 2),
        ("f1", "", "!", 1),
        ("f1", "", "word", 0),
        ("accuracy", "**Positive**.", "positive", 1),
        ("accuracy", "It is positive", "positive", 0),
    ],
)
def test_by_hand(name, answer, reference, expected):
    assert score(name, answer, reference) == pytest.approx(expected)


@given(st.text())
def test_the_reference_itself_scores_full(text):
    """Except for a reference that the metric refuses."""
    reply = Reply(text, (ToolCall("f", {"x": text}),))
    names = [name for name in ("exact", "number", "f1", "accuracy", "tool_call") if fault_of([name], reply) is None]
    assert set(scores_of(names, reply, reply).values()) == {1.0}


@given(st.text(), st.text())
def test_scores_are_shares_and_f1_is_symmetric(one, other):
    for name in ("exact", "number", "f1", "accuracy", "tool_call"):
        for value in METRICS[name](Reply(one), Reply(other)).values():
            assert 0 <= value <= 1
    assert score("f1", one, other) == score("f1", other, one)


@given(DATA)
def test_json_is_compared_as_data(data):
    """Keys in another order, other spaces and a code fence are the same data."""
    written = Reply(json.dumps(data))
    for other in (json.dumps(data, indent=2, sort_keys=True), f"```json\n{json.dumps(data)}\n```"):
        assert METRICS["json"](Reply(other), written) == {"json_valid": 1, "json_equal": 1}
    assert METRICS["json"](Reply(json.dumps([data])), written) == {"json_valid": 1, "json_equal": 0}


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "NaN", '{"a": Infinity}', "[" * 100_000, '{"a": 1} and more'])
def test_what_is_no_json(text):
    with pytest.raises(NotJson):
        read_json(text)
    assert METRICS["json"](Reply(text), Reply("1")) == {"json_valid": 0, "json_equal": 0}


def test_true_is_not_one():
    assert equal_data([1, {"a": 2.0}], [1.0, {"a": 2}])
    assert not equal_data({"a": True}, {"a": 1})
    assert not equal_data([1, 2], [2, 1])
    assert not equal_data({"a": 1}, {"a": 1, "b": None})


@given(st.permutations([("f", {"x": 1, "y": [2]}), ("f", {"x": 3}), ("g", {})]))
def test_calls_have_no_order(order):
    wanted = (ToolCall("f", {"y": [2], "x": 1}), ToolCall("f", {"x": 3}, id="7"), ToolCall("g", {}))
    made = tuple(ToolCall(name, arguments) for name, arguments in order)
    assert METRICS["tool_call"](Reply("", made), Reply("", wanted)) == {"tool_call": 1, "tool_name": 1}


@pytest.mark.parametrize(
    ("made", "tool_name"),
    [
        ((ToolCall("f", {"x": 2}),), 1),
        ((ToolCall("g", {"x": 1}),), 0),
        ((ToolCall("f", {"x": 1}), ToolCall("f", {"x": 1})), 0),
        ((), 0),
    ],
)
def test_a_wrong_call(made, tool_name):
    reference = Reply("", (ToolCall("f", {"x": 1}),))
    assert METRICS["tool_call"](Reply("f", made), reference) == {"tool_call": 0, "tool_name": tool_name}


def test_no_call_where_none_is_wanted():
    assert METRICS["tool_call"](Reply("hello"), Reply("hi"))["tool_call"] == 1


def test_bleu_and_rouge_are_those_of_training():
    reply = Reply("the cat sat on the mat")
    assert scores_of(["bleu", "rouge"], reply, reply) == pytest.approx(
        dict.fromkeys(("bleu-4", "rouge-1", "rouge-2", "rouge-l"), 100), abs=1e-3
    )


def test_classes_by_hand():
    """pos: 2 hits of 3 predicted and 3 true. neg: 1 hit of 2 predicted and 3 true. neutral is no class: a miss.

    Precision: (2/3 + 1/2) / 2. Recall: (2/3 + 1/3) / 2. F1: (2 2 / 6 + 2 1 / 5) / 2.
    """
    classes = Classes(ANSWERS, REFERENCES)
    assert classes.measure("precision").value == pytest.approx(7 / 12)
    assert classes.measure("recall").value == pytest.approx(1 / 2)
    assert classes.measure("class_f1").value == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert classes.table() == {
        "neg": pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "class_f1": 2 / 5, "n": 3}),
        "pos": pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "class_f1": 2 / 3, "n": 3}),
    }


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_classes_against_counting(pairs):
    """Each class counted one by one; the order of questions and the names of classes do not matter."""
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]

    def f1(label):
        hits = sum(a == r == label for a, r in pairs)
        return 2 * hits / (answers.count(label) + references.count(label))

    expected = sum(map(f1, set(references))) / len(set(references))
    assert Classes(answers, references).measure("class_f1").value == pytest.approx(expected)
    assert Classes(answers[::-1], references[::-1]).measure("class_f1").value == pytest.approx(expected)


def test_measures_of_all_questions():
    """Mean and standard error: s / sqrt(n) of 1, 0, 1, 0, 0, 1 is sqrt(6 1/4 / 5 / 6)."""
    names = ["accuracy", "precision", "exact"]
    scores = [scores_of(names, Reply(a), Reply(r)) for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    found = measures(names, scores, Classes(ANSWERS, REFERENCES))
    assert list(found) == ["accuracy", "exact", "precision"]
    assert found["accuracy"].value == 1 / 2
    assert found["accuracy"].standard_error == pytest.approx(math.sqrt(6 * 0.25 / 5 / 6))
    assert found["exact"].value == pytest.approx(1 / 3)
    assert found["precision"].num_questions == 6


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("number", "none", "has no number"),
        ("json", "{", "is no JSON"),
        ("recall", " . ", "names no class"),
        ("accuracy", "", "names no class"),
    ],
)
def test_references_that_compare_with_nothing(name, text, reason):
    assert reason in fault_of([name], Reply(text))
    assert fault_of([other for other in METRIC_NAMES if other not in ("number", "json")], Reply("yes")) is None


def test_a_class_keeps_its_inner_punctuation():
    assert class_of(' "Non-fiction:  history" \n') == "non-fiction: history"
