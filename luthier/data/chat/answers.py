"""Splits an answer into text and tool calls, however the data write the calls."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.core.errors import ToolFault
from luthier.data.tools import finite
from luthier.data.types import Message, ToolCall

CALL_WORDS = ("<tool_call>", "</tool_call>")
"""The tags around calls in data that are not written for one chat format."""
THINKING_TAGS = ("<think>", "</think>")
"""The tags around thoughts in data that are not written for one chat format."""
MAX_LEVELS = 100
"""Of lists and objects inside each other in a JSON value."""
_TOO_DEEP = f"it is nested more than {MAX_LEVELS} levels deep"
_SURROGATE = "\\ud"
"""The beginning of a surrogate in JSON text."""


@dataclass(slots=True)
class Answer:
    """An assistant or function message, split so that thoughts are searched outside the calls only."""

    text: str
    calls: list[ToolCall]


def take_apart(
    message: Message,
    thinking_tags: tuple[str, str] = THINKING_TAGS,
    call_words: Sequence[tuple[str, str]] = (CALL_WORDS,),
) -> Answer:
    """Splits a message; a thought that the data give apart (`Message.thought`) is no part of the text.

    A function message whose calls are text is JSON of one or more calls: bare, after a thought, or between call tags.
    Raises `ToolFault` for one that is none of these.
    """
    if message.role != "function" or message.calls:
        return Answer(message.content, list(message.calls))
    content = message.content
    value = _json(content)
    if value is not None:
        return Answer("", _calls(value))
    for words in call_words:
        enclosed = between(words)
        inner = enclosed.findall(content)
        if not inner:
            continue
        calls = [call for text in inner for call in _calls(_json(text))]
        return Answer(enclosed.sub("", content), calls)
    for tags in (thinking_tags, THINKING_TAGS):
        thought, rest = split_thought(content, tags)
        if thought is not None:
            return Answer(content.removesuffix(rest), _calls(_json(rest)))
    shown = repr(content[:80])
    raise ToolFault(f"a function message is not JSON of a call: {shown}", shown)


def between(words: tuple[str, str]) -> re.Pattern[str]:
    """Matches the two tags and the text between them, which is the group."""
    return re.compile(f"{re.escape(words[0])}(.*?){re.escape(words[1])}", re.DOTALL)


def split_thought(text: str, thinking_tags: tuple[str, str] = THINKING_TAGS) -> tuple[str | None, str]:
    """(the thought that an answer begins with, the text after it); (None, the text) for an answer without one.

    Tags further on are quoted: they are words of the answer. Whitespace around the tags and at the ends of the thought
    belongs to neither part.
    """
    opening, closing = (tag.strip() for tag in thinking_tags)
    begun = text.lstrip()
    thought, found, rest = begun.removeprefix(opening).partition(closing)
    if not begun.startswith(opening) or not found:
        return None, text
    return thought.strip(), rest.lstrip("\n")


def without_thought(text: str, thinking_tags: tuple[str, str] = THINKING_TAGS) -> str:
    return split_thought(text, thinking_tags)[1]


def has_thought(text: str, thinking_tags: tuple[str, str] = THINKING_TAGS) -> bool:
    """Whether an answer begins with a thought, whose opening tag may stand in the prompt already."""
    opening, closing = (tag.strip() for tag in thinking_tags)
    if text.lstrip().startswith(opening):
        return True
    before, found, _ = text.partition(closing)
    return bool(found) and opening not in before


def thought_of(message: Message, thinking_tags: tuple[str, str] = THINKING_TAGS) -> str:
    """The thought of an answer, given apart or at the beginning of its text; empty if it has none."""
    return message.thought or split_thought(message.content, thinking_tags)[0] or ""


def flat_text(message: Message, *, with_thought: bool = False) -> str:
    """A message as one text: calls that the data give as objects are JSON after the text, between tags."""
    text = message.content
    if message.calls:
        listed = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        calls = json.dumps(listed, ensure_ascii=False)
        text = f"{text}\n{CALL_WORDS[0]}{calls}{CALL_WORDS[1]}" if text else calls
    return f"{message.thought}\n{text}" if with_thought and message.thought else text


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError`, also for one that no tokenizer or syntax could write."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=finite)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    require_shallow(value)
    if _SURROGATE in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds an unpaired surrogate") from error
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")


def require_shallow(value: Any, levels: int = MAX_LEVELS) -> None:
    """Raises `ValueError` for a value with more than `levels` of lists and objects inside each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if inner and not levels:
        raise ValueError(_TOO_DEEP)
    for item in inner:
        if isinstance(item, (dict, list)):
            require_shallow(item, levels - 1)


def _json(text: str) -> Any:
    """The value of a JSON text, None if it is not JSON."""
    try:
        return read_json(text)
    except ValueError:
        return None


def _calls(value: Any) -> list[ToolCall]:
    calls = [_call(item) for item in (value if isinstance(value, list) else [value])]
    if not calls:
        raise ToolFault("a function message holds no call")
    return calls


def _call(value: Any) -> ToolCall:
    """A call, bare or as the `function` of an object, as in OpenAI's API, where `arguments` are JSON text."""
    match value:
        case {"function": dict(function)} if "name" not in value:
            return replace(_call(function), id=_id(value))
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, arguments, _id(value))
        case {"name": str(name), "arguments": str(text)} if isinstance(_json(text), dict):
            return ToolCall(name, _json(text), _id(value))
    shown = json.dumps(value, ensure_ascii=False)[:80]
    raise ToolFault(f"a call is not an object with name and arguments: {shown}", shown)


def _id(value: dict[str, Any]) -> str:
    given = value.get("id")
    return given if isinstance(given, str) else ""
