"""Answers are split into thought, text and calls in the same way, whatever the pieces in which they arrive."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.types import ToolCall
from luthier.infer.reading import AnswerReader, CallReader, Thought, Words, tags_of
from tests.serve.fakes import CALL, WEATHER

TAGS = ("<think>\n", "\n</think>\n\n")
TOOLS = [WEATHER, {"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}]
CALLS = [ToolCall("weather", {"city": "Łódź } </x>"}), ToolCall("ping", {})]
ONE_CALL = ("glm4",)


def read(pieces, syntax=None, tags=TAGS, **options):
    """The parts of an answer; neighbours of a kind are joined."""
    reader = AnswerReader(tags, calls=CallReader(syntax, TOOLS) if syntax else None, **options)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    assert all(part.text for part in parts if not isinstance(part, ToolCall)), "no part is empty"
    joined: list = []
    for part in parts:
        if joined and type(part) is type(joined[-1]) and not isinstance(part, ToolCall):
            joined[-1] = type(part)(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def test_text_is_given_out_at_once():
    reader = AnswerReader()
    assert [reader.push("a "), reader.push("b"), reader.finish()] == [[Words("a ")], [Words("b")], []]


def test_a_thought_is_given_out_as_it_comes():
    reader = AnswerReader(TAGS)
    found = [reader.push(piece) for piece in ("<th", "ink>", "\n\nhm", " so", "\n</thi", "nk>\n", "\n", "Yes.")]
    assert found == [[], [], [Thought("hm")], [Thought(" so")], [], [], [], [Words("Yes.")]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nhm\n</think>\n\nYes.", [Thought("hm"), Words("Yes.")]),
        ("<think>\n\n</think>\n\nYes.", [Words("Yes.")]),
        ("\n<think>hm</think>Yes.", [Thought("hm"), Words("Yes.")]),
        ("\n</think>\n\nYes.", [Words("Yes.")]),
        ("</thinks", [Words("</thinks")]),
        ("<think>cut off", [Thought("cut off")]),
        ("<think>cut off</thi", [Thought("cut off</thi")]),
        ("<thin", [Words("<thin")]),
        ("No <think> here", [Words("No <think> here")]),
        ("", []),
    ],
)
def test_thoughts(text, parts):
    assert read([text]) == read(text) == parts


@pytest.mark.parametrize(("syntax", "tags"), [(None, TAGS), ("qwen", TAGS), ("llama3", None), ("glm4", TAGS)])
def test_words_that_are_neither_thought_nor_call_are_given_out_at_once(syntax, tags):
    reader = AnswerReader(tags, calls=CallReader(syntax, TOOLS) if syntax else None)
    for piece in ("Hm", ", {", "1}", "[2]"):
        assert reader.push(piece) == [Words(piece)]
    assert reader.finish() == []


def test_a_thought_that_the_prompt_opened():
    assert read(["hm</th", "ink>Yes"], is_thinking=True) == [Thought("hm"), Words("Yes")]


@pytest.mark.parametrize("name", TOOL_SYNTAXES.names)
def test_calls_of_every_syntax_are_read_with_text_before_them(name):
    syntax = TOOL_SYNTAXES.get(name)
    calls = CALLS[:1] if name in ONE_CALL else CALLS
    whole_answer = not tags_of(name)[0]
    text = ("" if whole_answer else "Let me see.") + syntax.write(calls)
    expected = [*([] if whole_answer else [Words("Let me see.")]), *calls]
    assert read([text], name) == read(text, name) == expected


@pytest.mark.parametrize("name", TOOL_SYNTAXES.names)
def test_without_a_call_all_is_text(name):
    assert read("Just words, {no} call.", name) == [Words("Just words, {no} call.")]


def test_a_call_is_given_out_when_it_is_whole():
    reader = AnswerReader(None, calls=CallReader("qwen", TOOLS))
    assert reader.push("Hm. <tool") == [Words("Hm.")]
    assert reader.push(CALL.removeprefix("<tool")[:-1]) == []
    assert reader.push(">") == [ToolCall("weather", {"city": "Łódź"})]
    assert reader.push("\n<tool_call>\n{}") == reader.push("broken") == []
    assert reader.finish() == [Words("\n<tool_call>\n{}broken")]


def test_a_call_that_was_cut_off_is_text():
    assert read(["Hm. " + CALL[:-5]], "qwen") == [Words("Hm. " + CALL[:-5])]


def test_text_after_a_call_is_kept():
    assert read([CALL + "\nDone."], "qwen") == [ToolCall("weather", {"city": "Łódź"}), Words("\nDone.")]


def test_text_after_a_call_is_given_out_at_once():
    reader = AnswerReader(None, calls=CallReader("qwen", TOOLS))
    assert reader.push(CALL) == [ToolCall("weather", {"city": "Łódź"})]
    assert [reader.push("\nDone"), reader.push(".")] == [[Words("\nDone")], [Words(".")]]


@pytest.mark.parametrize("name", ["llama3", "mistral", "glm4"])
def test_blanks_before_an_answer_that_is_a_call_are_left_out(name):
    text = "\n\n " + TOOL_SYNTAXES.get(name).write(CALLS[:1])
    assert read([text], name) == read(text, name) == CALLS[:1]


def test_calls_whose_enclosing_tag_was_cut_off_are_whole():
    text = TOOL_SYNTAXES.get("minimax2").write(CALLS)
    assert read(["So.", text.removesuffix("</minimax:tool_call>")], "minimax2") == [Words("So."), *CALLS]


WORDS = st.text(alphabet='ab <>{}\n/"toolcanhik_', max_size=12)
ARGUMENTS = st.dictionaries(st.sampled_from("ab"), st.text(alphabet='xy}</>{\n"', max_size=6), max_size=2)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_parts_do_not_depend_on_the_pieces(data):
    name = data.draw(st.sampled_from(TOOL_SYNTAXES.names))
    syntax = TOOL_SYNTAXES.get(name)
    text = data.draw(WORDS)
    for _ in range(data.draw(st.integers(0, 2))):
        text += syntax.write([ToolCall("weather", data.draw(ARGUMENTS))]) + data.draw(WORDS)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, name) == read([text], name)


@settings(max_examples=100, deadline=None)
@given(before=WORDS, arguments=ARGUMENTS)
def test_nothing_is_lost_around_a_call(before, arguments):
    call = ToolCall("weather", arguments)
    text = before + TOOL_SYNTAXES.get("qwen").write([call])
    if "<tool_call>" in before:
        return
    parts = read(text, "qwen", tags=None)
    assert parts[-1] == call
    assert "".join(part.text for part in parts[:-1]) == before.rstrip()


def test_tags_are_read_off_the_syntax():
    assert tags_of("qwen") == ("<tool_call>", "</tool_call>")
    assert tags_of("default") == ("Action:", "}")
    assert tags_of("mistral") == tags_of("llama3") == tags_of("glm4") == ("", "")
    assert all(re.fullmatch(r"<[^<>]+>|\w+:|", tags_of(name)[0]) for name in TOOL_SYNTAXES.names)
