"""Messages of OpenAI's API become luthier's: parallel results, calls with JSON text, parts, developer."""

import json

import pytest

from luthier.core.kinds import FORMATS
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.types import Message, ToolCall, ToolResult
from luthier.serve.convert import conversation, require_turns, tools_text
from luthier.serve.errors import ApiError
from luthier.serve.protocol import ChatMessage, Tool


def asked(*messages, **options):
    return conversation([ChatMessage(**message) for message in messages], **options)


def refused(*messages, **options) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asked(*messages, **options)
    return caught.value


USER = {"role": "user", "content": "hi"}


def call(name="f", arguments="{}", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_system_and_developer_texts_open_the_conversation():
    found = asked({"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER)
    assert (found.system, found.messages) == ("a\n\nb", (Message("user", "hi"),))
    assert asked(USER).system is None
    assert asked({"role": "system", "content": ""}, USER).system == ""


def test_content_may_be_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]
    assert asked({"role": "user", "content": parts}).messages == (Message("user", "ab"),)


def test_an_answer_with_calls_and_the_results_of_all_of_them():
    found = asked(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("a", '{"x": 1}', id="1"), call("b", id="2")]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "assistant", "content": "done", "reasoning_content": "hm"},
        USER,
    ).messages
    assert found[1] == Message("function", "", calls=(ToolCall("a", {"x": 1}, "1"), ToolCall("b", {}, "2")))
    assert found[2].results == (ToolResult("one", "1"), ToolResult("two", "2"))
    assert found[3] == Message("assistant", "done", thought="hm")
    assert [message.role for message in found] == ["user", "function", "observation", "assistant", "user"]
    require_turns(found)


def test_a_result_needs_no_id():
    found = asked(USER, {"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "content": "x"}).messages
    assert found[2] == Message("observation", "x", results=(ToolResult("x"),))


def test_the_older_names_of_calls_and_results():
    found = asked(
        USER,
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "x"},
    ).messages
    assert found[1].calls == (ToolCall("f", {"a": 1}),)
    assert found[2].results == (ToolResult("x", "", "f"),)


@pytest.mark.parametrize("arguments", ['{"a": "{\\"b\\": 1}"}', {"a": '{"b": 1}'}], ids=["text", "object"])
def test_arguments_are_decoded_once(arguments):
    found = asked(USER, {"role": "assistant", "tool_calls": [call(arguments=arguments)]}).messages
    assert found[1].calls[0].arguments == {"a": '{"b": 1}'}


@pytest.mark.parametrize("arguments", ["", None, "{}"])
def test_no_arguments(arguments):
    assert (
        asked(USER, {"role": "assistant", "tool_calls": [call(arguments=arguments)]}).messages[1].calls[0].arguments
        == {}
    )


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", '{"a": "\\ud800"}'])
def test_arguments_that_are_no_object(arguments):
    fault = refused(USER, {"role": "assistant", "tool_calls": [call(arguments=arguments)]})
    assert fault.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user", "content": None}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            "messages[0].content[0]",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([USER, {"role": "system", "content": "late"}, USER], "messages[1].role"),
        ([{"role": "system", "content": "alone"}], "messages"),
    ],
)
def test_what_is_wrong_is_named(messages, param):
    assert refused(*messages).param == param


def test_the_last_answer_may_be_continued():
    found = asked(USER, {"role": "assistant", "content": "Once upon"}, continues=True)
    assert (found.messages, found.begun) == ((Message("user", "hi"),), "Once upon")
    assert refused(USER, continues=True).param == "continue_final_message"


@pytest.mark.parametrize("roles", [("user", "user"), ("assistant", "user"), ("user", "assistant")])
def test_formats_with_slots_write_questions_and_answers_in_turn(roles):
    with pytest.raises(ApiError) as caught:
        require_turns([Message(role, "x") for role in roles])
    assert caught.value.param == "messages"


def test_tools_keep_their_keys_but_those_for_the_server():
    function = {"strict": True, "name": "f", "description": None, "parameters": {"type": "object"}}
    text = tools_text([Tool(type="function", function=function)])
    assert json.loads(text) == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert tools_text([]) == tools_text(None) == ""


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "please"}]},
    {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "two cities",
        "tool_calls": [call("weather", '{"city": "Łódź"}', id="1"), call("weather", {"city": "Oslo"}, id="2")],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "tool", "tool_call_id": "2", "content": "sun"},
    {"role": "assistant", "content": "Rain and sun.", "reasoning_content": "done"},
    {"role": "user", "content": "Thanks"},
]


def test_a_conversation_is_the_one_that_training_reads_from_the_same_messages():
    """The dataset format `openai` takes rows with the messages of an API; its rows end with an answer."""
    row = {"messages": [*TALK, {"role": "assistant", "content": "Bye."}]}
    description = DatasetSpec(name="d", source=Source("file", "rows.json"), formatting="openai")
    example = FORMATS.get("openai").read(row, description)
    found = asked(*TALK)
    assert (found.system, found.messages) == (example.system, example.messages[:-1])
