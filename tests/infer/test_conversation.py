"""A conversation keeps questions and answers in turn, calls as calls, and takes back what was not answered."""

import json

import pytest

from luthier.core.errors import InvalidInput
from luthier.data.media.kinds import media_kind
from luthier.data.types import Message, ToolCall
from luthier.infer.conversation import Conversation, read_tools
from luthier.infer.reading import AnswerFormat, Thought, Words
from luthier.infer.session import ChatSession
from luthier.infer.types import Settings
from tests.deep import DEPTHS, deep_tools
from tests.infer.fakes import PlainPrompting, ScriptedModel

TOOLS = json.dumps([{"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}])
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'


def session(*answers, **conversation):
    return ChatSession(ScriptedModel(*answers), Conversation(PlainPrompting(), **conversation), Settings())


def test_the_prompt_holds_what_was_said_before():
    chat = session("Hello.", "Fine.", system="Be brief.")
    assert chat.ask("Hi") == "Hello."
    chat.ask("How are you?")
    assert chat.model.prompts == [
        "system: Be brief.\nuser: Hi",
        "system: Be brief.\nuser: Hi\nassistant: Hello.\nuser: How are you?",
    ]


def test_clear_forgets_the_history_and_keeps_the_system_text():
    chat = session("Hello.", "Again.", system="Be brief.")
    chat.ask("Hi")
    chat.clear()
    chat.ask("Hi")
    assert chat.model.prompts[0] == chat.model.prompts[1]


def test_calls_are_kept_as_calls_and_the_next_message_is_the_result():
    chat = session(CALL, "It rains.", "Bye.", tools=TOOLS)
    chat.ask("Weather?")
    assert [(call.name, call.arguments) for call in chat.tool_calls] == [("weather", {"city": "Łódź"})]
    chat.ask("rain")
    assert chat.conversation.history[1] == Message("function", "", calls=(ToolCall("weather", {"city": "Łódź"}),))
    assert [message.role for message in chat.conversation.history] == ["user", "function", "observation", "assistant"]
    assert chat.tool_calls == []
    chat.ask("Thanks")
    assert chat.conversation.history[4].role == "user"


def test_without_tools_nothing_is_a_call():
    chat = session(CALL)
    chat.ask("Weather?")
    assert chat.conversation.history[1] == Message("assistant", CALL)


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<end>")
THOUGHT_CALL = f"<think>|Rain?|</think>|See.<end>\n|{CALL}|<end>"


def special_session(*answers, **settings):
    """With a model whose tags are special tokens."""
    answer_format = AnswerFormat(("<think>", "</think>"), "qwen")
    conversation = Conversation(PlainPrompting(), tools=TOOLS)
    model = ScriptedModel(*answers, special=TAGS)
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    return ChatSession(model, conversation, Settings(**settings), answer_format, decode, frozenset(TAGS))


def test_tags_that_are_special_tokens_are_read_and_not_shown():
    chat = special_session(THOUGHT_CALL, "No|.<end>")
    call = ToolCall("weather", {"city": "Łódź"})
    assert list(chat.stream_parts("Weather?")) == [Thought("Rain?"), Words("See."), call]
    assert chat.tool_calls == [call]
    assert chat.conversation.history[1].content == "<think>Rain?</think>See."
    assert list(chat.stream_parts("rain")) == [Words("No"), Words(".")]


def test_a_plain_answer_is_as_it_is_without_special_tokens_and_its_calls_are_read():
    chat = special_session(THOUGHT_CALL)
    inner = CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    pieces = chat.stream("Weather?")
    assert [next(pieces) for _ in range(3)] == ["Rain?", "See.\n", inner]
    with pytest.raises(StopIteration) as done:
        next(pieces)
    assert done.value.value.text == f"Rain?See.\n{inner}"
    assert [call.name for call in chat.tool_calls] == ["weather"]


def test_special_tokens_that_are_wanted_are_shown():
    chat = special_session("Yes|<end>", skip_special_tokens=False)
    assert list(chat.stream_parts("So?")) == [Words("Yes"), Words("<end>")]
    assert chat.conversation.history[1].content == "Yes<end>"


def test_an_answer_left_half_way_counts_as_far_as_it_went():
    chat = session("one |two |three")
    pieces = chat.stream("Count")
    assert [next(pieces), next(pieces)] == ["one ", "two "]
    pieces.close()
    assert chat.conversation.history == (Message("user", "Count"), Message("assistant", "one two "))


def test_an_interrupted_answer_counts_as_far_as_it_went():
    chat = session("one |^C")
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Count")
    assert chat.conversation.history[1] == Message("assistant", "one ")


def test_a_question_that_got_no_answer_is_taken_back():
    chat = session("^C", "yes")
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Are you there?")
    assert chat.conversation.history == ()
    chat.ask("Now?")
    assert chat.model.prompts[-1] == "user: Now?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        *((deep_tools(depth), "nested more than 100 levels deep") for depth in DEPTHS),
        ("{}", "a JSON list"),
        ("[1]", "a JSON list"),
        ('[{"name": "a"}, {"description": "b"}]', "function 2 of the list has no name"),
        ('[{"type": "function", "function": 1}]', "function 1 of the list has no name"),
    ],
)
def test_tools_that_are_none_are_refused(text, message):
    with pytest.raises(InvalidInput, match=message):
        read_tools(text)


def test_tools_may_be_bare_or_wrapped():
    assert read_tools(TOOLS) == TOOLS
    wrapped = json.dumps([{"type": "function", "function": {"name": "f"}}])
    assert read_tools(wrapped) == wrapped


@pytest.mark.parametrize("changes", [{"text": "a\udcff"}, {"system": "\ud800"}])
def test_a_text_that_is_not_utf8_is_refused_and_the_conversation_goes_on(changes):
    """Python reads bytes of a command line that are not UTF-8 as such halves of pairs."""
    chat = session("Hello.", system=changes.get("system"))
    with pytest.raises(InvalidInput, match="not UTF-8"):
        chat.ask(changes.get("text", "Hi"))
    chat.conversation.system = None
    assert chat.ask("Hi") == "Hello."


@pytest.mark.parametrize("name", ["~nobody-here/a.png", "a\0b", "a" * 300, "absent.png"])
def test_a_file_that_cannot_be_there_is_said(name):
    with pytest.raises(InvalidInput, match="there is no such file"):
        session().conversation.show(name)


def test_a_question_that_is_taken_back_shows_its_own_media_again():
    kind = media_kind("image")
    chat = session()
    first, second = (kind.item(f"/{name}.png") for name in ("first", "second"))
    asked = [Message("user", kind.place + text) for text in ("What?", "And this?")]
    chat.conversation.history = (asked[0], Message("assistant", "A cat."), asked[1], Message("assistant", "A dog."))
    chat.conversation.items = (first, second)
    assert chat.conversation.take_back() == "And this?"
    assert (chat.conversation.items, chat.conversation.shown) == ((first,), (second,))
