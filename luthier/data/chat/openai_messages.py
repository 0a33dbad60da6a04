"""Messages as a client of OpenAI's API sends them, for a model's own chat template.

    Message("function", "Let me look.", thought="...", calls=(ToolCall("weather", {"city": "Rome"}, "c1"),))
    -> {"role": "assistant", "content": "Let me look.", "reasoning_content": "...", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]}

They are the messages of the data. Only what the template could not read otherwise is adapted: the key of a thought,
arguments as JSON text, and ids of calls where data have none and the template fails without.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.core.errors import ToolFault
from luthier.data.chat.answers import has_thought, split_thought, take_apart, without_thought
from luthier.data.chat.program import OpenAIMessage, function_call
from luthier.data.chat.traits import Traits
from luthier.data.types import Message, ToolCall, ToolResult


def openai_messages(
    messages: Sequence[Message], traits: Traits, *, drops_thoughts: bool = False, learns_last: bool = False
) -> list[OpenAIMessage]:
    """The messages without the system text. `learns_last`: the last one is an answer to learn, so no id is invented.

    Raises `ToolFault` for calls that are no JSON, and for an answer that would teach an id which the data lack.
    """
    listed: list[OpenAIMessage] = []
    asked: list[str] = []
    num_calls = 0
    for number, message in enumerate(messages, start=1):
        if message.role == "user":
            listed.append({"role": "user", "content": message.content})
        elif message.role == "observation":
            listed += _results(message, asked)
        else:
            text, calls = text_and_calls(message)
            listed.append(_answer(message.thought, text, traits, drops_thoughts))
            asked = [call.id for call in calls]
            if traits.needs_ids and not all(asked):
                if learns_last and number == len(messages) and traits.writes_ids:
                    raise ToolFault("the model's own chat template writes the ids of calls, and the data give none")
                asked = [call_id or _invented(num_calls + place) for place, call_id in enumerate(asked)]
            num_calls += len(calls)
            if calls:
                listed[-1]["tool_calls"] = [
                    _call(call, call_id, traits) for call, call_id in zip(calls, asked, strict=True)
                ]
    return listed


def text_and_calls(message: Message) -> tuple[str, list[ToolCall]]:
    """Line breaks between a text and calls that are written into it are no part of the text."""
    answer = take_apart(message)
    from_text = answer.calls and not message.calls
    return (answer.text.strip("\n") if from_text else answer.text), answer.calls


def _answer(thought: str, text: str, traits: Traits, drops_thoughts: bool) -> OpenAIMessage:
    if drops_thoughts:
        thought, text = "", without_thought(text)
    elif not thought and traits.thought_key and not traits.reads_inline and has_thought(text):
        inline, rest = split_thought(text)
        thought, text = (inline, rest) if inline is not None else (thought, text)
    key = traits.thought_key or "reasoning_content"
    return {"role": "assistant", "content": text, **({key: thought} if thought else {})}


def _call(call: ToolCall, call_id: str, traits: Traits) -> dict[str, Any]:
    arguments: Any = json.dumps(call.arguments, ensure_ascii=False) if traits.text_arguments else call.arguments
    return function_call(call.name, arguments, call_id)


def _results(message: Message, asked: Sequence[str]) -> Iterator[OpenAIMessage]:
    """One message for each result. One without an id has that of the call at its place."""
    for place, result in enumerate(message.results or (ToolResult(message.content),)):
        call_id = result.call_id or (asked[place] if place < len(asked) else "")
        yield {
            "role": "tool",
            "content": result.content,
            **({"tool_call_id": call_id} if call_id else {}),
            **({"name": result.name} if result.name else {}),
        }


def _invented(number: int) -> str:
    """Nine letters and digits, the only form that some templates accept."""
    return f"call{number:05d}"
