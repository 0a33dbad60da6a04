"""What a tool-call syntax is: how tools are described to a model, how its calls are written and how they are read.

Each other file in this folder is one syntax; its file name is the value of `tool_format`. `parse(write(calls))` gives
the calls back wherever the wire format can carry them; where it cannot, the file says so.

A tool is a JSON object with name, description and parameters (a JSON Schema), bare or as the `function` of an object of
type `function`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol

Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


class Parse(Protocol):
    def __call__(self, text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSyntax:
    name: str
    describe: Callable[[Sequence[Tool], date], str]
    """(tools, today) -> what stands after the system text."""
    write: Callable[[Sequence[ToolCall]], str]
    """The text of one or more calls. Raises `RowError` for calls that the wire format has no words for."""
    parse: Parse
    """(text, tools) -> the calls in it, or None if it holds none or broken ones. The tools, if given, tell the types of
    arguments where the wire format does not."""
    after_text: str = ""
    """What separates a thought or text from the first call."""


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def bare(tool: Tool) -> Tool:
    """The function object itself."""
    return tool["function"] if tool.get("type") == "function" else tool


def wrapped(tool: Tool) -> Tool:
    """The function object inside an object of type `function`."""
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def call_from(value: Any, arguments_key: str = "arguments") -> ToolCall | None:
    """The call in a JSON object, or None if it is not one."""
    match value:
        case {"name": str(name), **rest}:
            arguments = rest.get(arguments_key)
            return ToolCall(name, arguments) if isinstance(arguments, dict) else None
    return None


def calls_from(values: Iterable[Any], arguments_key: str = "arguments") -> list[ToolCall] | None:
    """The calls in JSON objects, or None if there are none or if one is not a call."""
    calls = [call_from(value, arguments_key) for value in values]
    good = [call for call in calls if call is not None]
    return good if good and len(good) == len(calls) else None


def loads(text: str) -> Any:
    """The JSON value of a text, or None if it is not JSON (no call is the JSON value null)."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def spans(text: str, opening: str, closing: str) -> list[Any] | None:
    """The JSON value inside each pair of tags, None for a text without tags or with something else between them.

    The JSON is decoded from the opening tag on, so a tag inside one of its strings does no harm.
    """
    values, decoder, at = [], json.JSONDecoder(), text.find(opening)
    while at >= 0:
        body = text[at + len(opening) :].lstrip()
        try:
            value, end = decoder.raw_decode(body)
        except ValueError:
            return None
        rest = body[end:].lstrip()
        if not rest.startswith(closing):
            return None
        values.append(value)
        text = rest[len(closing) :]
        at = text.find(opening)
    return values or None


def value_text(value: Any) -> str:
    """An argument in a wire format that writes strings without quotes and everything else as JSON."""
    return value if isinstance(value, str) else dump(value)


def value_from(text: str, name: str, argument: str, tools: Sequence[Tool]) -> Any:
    """The argument that such a text stands for: what the tool's schema says is a string stays one, the rest is JSON.

    Without a schema a text that looks like a number comes back as a number.
    """
    if "string" in _types(name, argument, tools):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _types(name: str, argument: str, tools: Sequence[Tool]) -> tuple[str, ...]:
    for tool in map(bare, tools):
        if tool["name"] == name:
            schema = tool.get("parameters", {}).get("properties", {}).get(argument, {})
            kind = schema.get("type", ())
            return (kind,) if isinstance(kind, str) else tuple(kind)
    return ()


def read_tagged(
    text: str, tools: Sequence[Tool], *, opening: re.Pattern[str], argument: re.Pattern[str], closing: re.Pattern[str]
) -> list[ToolCall] | None:
    """The calls of a syntax in tags: `opening` catches the name, `argument` a key and the text of its value.

    Goes from tag to tag, so a text that breaks off costs no more time than a whole one.
    """
    calls, at = [], 0
    while head := opening.search(text, at):
        arguments: dict[str, Any] = {}
        at = head.end()
        while pair := argument.match(text, at):
            arguments[pair[1]] = value_from(pair[2], head[1], pair[1], tools)
            at = pair.end()
        tail = closing.match(text, at)
        if tail is None:
            return None
        calls.append(ToolCall(head[1], arguments))
        at = tail.end()
    return calls or None
