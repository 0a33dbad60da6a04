"""An answer comes apart into thought, text and calls, and tags that it only quotes stay in its text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ToolFault
from luthier.data.chat.answers import (
    flat_text,
    has_thought,
    read_json,
    split_thought,
    take_apart,
    thought_of,
    without_thought,
)
from luthier.data.types import Message, ToolCall

CALL = {"name": "f", "arguments": {"x": 1}}
OTHER_TAGS = ("<seed:think>", "</seed:think>")


@pytest.mark.parametrize(
    ("text", "thought", "rest"),
    [
        ("<think>\nso\n</think>\n\n6", "so", "6"),
        ("\n <think>so</think>6", "so", "6"),
        ("<think>\n\n</think>\n\n6", "", "6"),
        ("<think>a</think><think>b</think>6", "a", "<think>b</think>6"),
        ("6", None, "6"),
        ("\n6", None, "\n6"),
        ("Write <think>so</think>", None, "Write <think>so</think>"),
        ("<think>so", None, "<think>so"),
        ("so</think>6", None, "so</think>6"),
        ("", None, ""),
    ],
)
def test_a_thought_is_what_an_answer_begins_with(text, thought, rest):
    assert split_thought(text) == (thought, rest)
    assert without_thought(text) == rest
    assert thought_of(Message("assistant", text)) == (thought or "")
    assert thought_of(Message("assistant", text, thought="apart")) == "apart"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>so</think>6", True),
        ("<think>so", True),
        ("so</think>6", True),
        ("\n <think>so</think>6", True),
        ("6", False),
        ("Write <think>.", False),
        ("Write <think>so</think>.", False),
    ],
)
def test_whether_an_answer_begins_with_a_thought(text, found):
    """Its opening tag may stand in the prompt; then the closing tag comes without one."""
    assert has_thought(text) is found
    assert has_thought(text.replace("think", "seed:think"), OTHER_TAGS) is found


@given(st.text(max_size=9), st.text(max_size=9))
def test_no_word_behind_the_thought_is_lost(thought, text):
    inside, rest = split_thought(f"<think>\n{thought}\n</think>\n\n{text}")
    assert "<" in thought or (inside, rest) == (thought.strip(), text.lstrip("\n"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (json.dumps(CALL), ""),
        (json.dumps([CALL]), ""),
        (json.dumps([{"id": "", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]), ""),
        (f"<think>so</think>\n\n{json.dumps(CALL)}", "<think>so</think>\n\n"),
        (f"I look.\n<tool_call>{json.dumps(CALL)}</tool_call>", "I look.\n"),
    ],
)
@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("<think>\n", "\n</think>\n\n"), OTHER_TAGS])
def test_calls_in_text(content, text, tags):
    found = take_apart(Message("function", content), tags)
    assert (found.text, found.calls) == (text, [ToolCall("f", {"x": 1})])


def test_ids_in_the_text_of_calls_are_kept():
    listed = [{**CALL, "id": "a"}, {"id": "b", "function": CALL}, {**CALL, "id": None}, CALL]
    found = take_apart(Message("function", json.dumps(listed)))
    assert [call.id for call in found.calls] == ["a", "b", "", ""]


def test_calls_as_objects_keep_their_text_and_ids():
    calls = (ToolCall("f", {"x": 1}, "id1"), ToolCall("g", {}, "id2"))
    found = take_apart(Message("function", "I <tool_call> look.", calls=calls, thought="so"))
    assert (found.text, found.calls) == ("I <tool_call> look.", list(calls))


def test_a_message_as_one_text():
    call = (ToolCall("f", {"c": "Zürich"}),)
    written = '[{"name": "f", "arguments": {"c": "Zürich"}}]'
    assert flat_text(Message("assistant", "6", thought="so")) == "6"
    assert flat_text(Message("assistant", "6", thought="so"), with_thought=True) == "so\n6"
    assert flat_text(Message("function", "", calls=call)) == written
    assert flat_text(Message("function", "I look.", calls=call)) == f"I look.\n<tool_call>{written}</tool_call>"
    assert take_apart(Message("function", written)).calls == list(call)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "Expecting property name"),
        ("[NaN]", "NaN is no JSON value"),
        ("[-Infinity]", "-Infinity is no JSON value"),
        ("[-1e999]", "-1e999 is beyond all floats"),
        ('"\\uD800"', "unpaired surrogate"),
        ('{"\\udfff": 1}', "unpaired surrogate"),
        ("[" * 102 + "]" * 102, "more than 100 levels"),
        ("[" * 99999, "more than 100 levels"),
        ("1" * 5000, "4300 digits"),
    ],
)
def test_json_that_cannot_be_written_again(text, fault):
    with pytest.raises(ValueError, match=fault):
        read_json(text)
    with pytest.raises(ToolFault, match="not JSON of a call"):
        take_apart(Message("function", text))


def test_json_of_whole_surrogate_pairs_and_of_many_levels():
    assert read_json('"\\ud83d\\ude00"') == "😀"
    assert read_json("[" * 101 + "]" * 101)
    assert read_json("5") == 5
