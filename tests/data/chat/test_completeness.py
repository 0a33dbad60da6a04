"""What an answer holds stands in its rendering, or the text that is lost is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.data.chat.completeness import learned_answers, num_left_out, require_complete
from luthier.data.types import Dialogue, Feedback, Message, Preference, Prompt, ToolCall

THOUGHT = Message("assistant", "It is 6.", thought="two times three")
INLINE = Message("assistant", "<think>\ntwo times three\n</think>\n\nIt is 6.")
ARGUMENTS = {"city": "Zürich", "days": 2, "at": {"h": [True, None]}}
CALL = Message("function", "Let me look.", calls=(ToolCall("weather", ARGUMENTS),))
AS_JSON = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
AS_TEXT = json.dumps({"name": "weather", "arguments": json.dumps(ARGUMENTS)})


@pytest.mark.parametrize("message", [THOUGHT, INLINE])
@pytest.mark.parametrize(
    "rendered",
    [
        "<think>\ntwo times three\n</think>\n\nIt is 6.<|im_end|>",
        "[THINK]two times three[/THINK]It is 6.</s>",
        "<|channel|>analysis<|message|>two times three<|end|><|channel|>final<|message|>It is 6.<|return|>",
    ],
)
def test_thought_and_text_stand_between_the_words_of_any_format(message, rendered):
    require_complete(message, rendered)


@pytest.mark.parametrize("message", [THOUGHT, INLINE])
def test_a_lost_thought_is_named_unless_it_is_left_out_by_the_users_wish(message):
    with pytest.raises(RowError, match=r"does not write the thought of an answer.*'two times three'"):
        require_complete(message, "<think>\n\n</think>\n\nIt is 6.<|im_end|>")
    require_complete(message, "It is 6.<|im_end|>", thoughts_dropped=True)
    with pytest.raises(RowError, match=r"does not write the text of an answer.*'It is 6.'"):
        require_complete(message, "two times three", thoughts_dropped=True)


def test_a_text_that_only_the_thought_repeats_is_lost():
    message = Message("assistant", "6", thought="so 6")
    require_complete(message, "<think>so 6</think>6")
    with pytest.raises(RowError, match="the text of an answer"):
        require_complete(message, "<think>so 6</think>")


def test_tags_that_an_answer_quotes_are_its_words():
    message = Message("assistant", "Write <think>like this</think> first.")
    require_complete(message, "Write <think>like this</think> first.<|im_end|>", thoughts_dropped=True)
    with pytest.raises(RowError, match="the text of an answer"):
        require_complete(message, "Write  first.<|im_end|>", thoughts_dropped=True)


@pytest.mark.parametrize(
    "rendered",
    [
        f"Let me look.\n<tool_call>{AS_JSON}</tool_call>",
        f"Let me look.{AS_TEXT}",
        "Let me look.<function=weather><parameter=city>Zürich</parameter><parameter=days>2<at>{'h': [True, None]}</at>",
    ],
)
def test_calls_in_the_spellings_of_formats(rendered):
    require_complete(CALL, rendered)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("weather", "call of 'weather'"),
        ("Zürich", "'Zürich'"),
        ("days", "'days'"),
        ("null", "'None'"),
        ("look", "look"),
    ],
)
def test_what_a_call_loses_is_named(lost, reason):
    whole = f"Let me look. weather {json.dumps(CALL.calls[0].arguments, ensure_ascii=False)}"
    require_complete(CALL, whole)
    with pytest.raises(RowError, match=reason):
        require_complete(CALL, whole.replace(lost, "x"))


def test_each_of_two_calls_is_written():
    twice = Message("function", json.dumps([{"name": "f", "arguments": {}}] * 2))
    require_complete(twice, "f() f()")
    with pytest.raises(RowError, match="the call of 'f'"):
        require_complete(twice, "f()")


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0<>"), min_size=1, max_size=12)


@given(texts, texts, st.integers(0, 11))
def test_any_missing_character_is_seen(thought, text, place):
    message = Message("assistant", text, thought=thought)
    require_complete(message, f"<t>{thought.strip()}</t>{text.strip()}<e>")
    words = text.strip()
    if place < len(words) and words.count(words[place]) == 1:
        with pytest.raises(RowError):
            require_complete(Message("assistant", text), f"<e>{words.replace(words[place], '')}<e>")


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=5)


@given(st.dictionaries(texts, values))
def test_arguments_of_every_kind_are_found_as_json(arguments):
    message = Message("function", "", calls=(ToolCall("f", arguments),))
    for in_ascii in (False, True):
        whole = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=in_ascii)
        require_complete(message, whole)
        require_complete(message, json.dumps(whole, ensure_ascii=in_ascii))
    require_complete(message, f"f {arguments}")


U, A, B = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")


@pytest.mark.parametrize(
    ("example", "every", "last"),
    [
        (Dialogue((U, A, U, B)), (A, B), (B,)),
        (Feedback((U, A, U, B), liked=True), (B,), (B,)),
        (Preference((U, A, U), A, B), (A, B), (A, B)),
        (Prompt((U, A, U)), (), ()),
    ],
)
def test_the_answers_that_a_row_teaches(example, every, last):
    assert learned_answers(example) == every and learned_answers(example, only_last=True) == last


def test_thoughts_that_stand_nowhere_are_counted():
    other_tags = Message("assistant", "<seed:think>so</seed:think>6")
    answers = (THOUGHT, INLINE, A, other_tags)
    assert num_left_out(answers, "It is 6. a 6", ("<seed:think>", "</seed:think>")) == 3
    assert num_left_out(answers, "two times three It is 6. a 6") == 0
    assert num_left_out(answers, "<seed:think>so</seed:think>6") == 2
