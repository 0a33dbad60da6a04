"""The server's side of `template check` is made apart from the rows of training, so faults of those are found."""

import json
from dataclasses import replace

import pytest

import luthier.data.chat.model_template
from luthier.core.errors import RowError
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.template_slots import template_from_slots
from luthier.data.rows.encoding import Encoding
from luthier.data.types import Dialogue, Message, ToolCall, ToolResult
from luthier.inspection.agreement import Finding, compare
from luthier.inspection.sample_dialogues import SAMPLES
from luthier.inspection.server import Server
from luthier.model.tokenizer import stop_token_ids
from tests.trait_programs import MODELS, model_tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
TOOLS = json.dumps([TOOL])
TWO_CALLS = (
    Message("user", "Rome or Bern?"),
    Message("function", "", calls=tuple(ToolCall("weather", {"city": c}, f"abcdefg{c[:2]}") for c in ("Rome", "Bern"))),
    Message("observation", "3\n5", results=(ToolResult("3", "abcdefgRo"), ToolResult("5", "abcdefgBe"))),
    Message("assistant", "Bern."),
)


def checked(name: str, sample) -> Finding:
    tokenizer = model_tokenizer(name)
    own = template_from_slots(tokenizer)
    thinking = sample.enable_thinking
    program = ModelChatTemplate(Encoder(tokenizer), thinking)
    training = Encoding(program.encoder, own, None, thinking, model_template=program)
    stops = stop_token_ids(tokenizer, own.stop_words)
    return compare(training, Server(tokenizer, thinking), sample.dialogue, stops)


@pytest.mark.parametrize("name", MODELS)
def test_every_sample_is_equal_or_refused(name):
    findings = {sample.name: checked(name, sample) for sample in SAMPLES}
    assert not {sample: f for sample, f in findings.items() if f.status == "differs"}
    if not MODELS[name].refuses:
        assert {finding.status for finding in findings.values()} == {"equal"}


def test_the_messages_are_those_of_openais_api():
    tokenizer = model_tokenizer("call ids")
    (first, second) = Server(tokenizer).asked(Dialogue(TWO_CALLS, tools=TOOLS))
    calls = [
        {"id": f"abcdefg{c[:2]}", "type": "function", "function": {"name": "weather", "arguments": {"city": c}}}
        for c in ("Rome", "Bern")
    ]
    messages = [
        {"role": "user", "content": "Rome or Bern?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefgRo"},
        {"role": "tool", "content": "5", "tool_call_id": "abcdefgBe"},
    ]
    given = {"tools": [TOOL], "tokenize": False}
    assert first.prompt == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **given)
    assert first.whole == tokenizer.apply_chat_template(messages[:2], **given)
    assert second.prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True, **given)


def joined_results(messages, *rest, **options):
    """A fault: the results of parallel calls as one message."""
    one = [replace(message, results=()) if message.role == "observation" else message for message in messages]
    return luthier.data.chat.openai_messages.openai_messages(one, *rest, **options)


def other_ids(messages, *rest, **options):
    """A fault: ids of calls are replaced."""
    new = [
        replace(message, calls=tuple(replace(call, id="callcall1") for call in message.calls)) for message in messages
    ]
    return luthier.data.chat.openai_messages.openai_messages(new, *rest, **options)


def a_line_more(messages, *rest, **options):
    """A fault: a line break behind the text beside a call."""
    new = [
        replace(message, content=f"{message.content}\n") if message.calls and message.content else message
        for message in messages
    ]
    return luthier.data.chat.openai_messages.openai_messages(new, *rest, **options)


@pytest.mark.parametrize(
    ("fault", "name", "sample"),
    [
        (joined_results, "grouped results", "parallel calls"),
        (joined_results, "call ids", "parallel calls"),
        (other_ids, "call ids", "tools"),
        (a_line_more, "grouped results", "text beside a call"),
    ],
)
def test_faults_of_the_messages_of_training_are_found(monkeypatch, fault, name, sample):
    (chosen,) = [one for one in SAMPLES if one.name == sample]
    assert checked(name, chosen).status == "equal"
    monkeypatch.setattr(luthier.data.chat.model_template, "openai_messages", fault)
    assert checked(name, chosen).status == "differs"


def test_a_thought_that_training_loses_is_found(monkeypatch):
    (chosen,) = [one for one in SAMPLES if one.name == "thinking on"]
    assert checked("strips thought", chosen).status == "equal"
    monkeypatch.setattr(luthier.data.chat.model_template, "_loss", lambda *_: None)
    finding = checked("strips thought", chosen)
    assert (finding.status, "does not write the thought" in finding.reason) == ("differs", True)


def test_without_a_template_for_the_conversation_it_is_refused():
    tokenizer = model_tokenizer("grouped results")
    named = {"tool_use": tokenizer.chat_template}
    from tests.trait_programs import merging_tokenizer

    server = Server(merging_tokenizer(named))
    assert len(server.asked(Dialogue(TWO_CALLS, tools=TOOLS))) == 2
    with pytest.raises(RowError, match="template named tool_use, but none named default"):
        server.asked(Dialogue(TWO_CALLS[:1] + TWO_CALLS[3:]))
