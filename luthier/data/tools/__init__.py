"""Tool-call syntaxes: how tools are described to a model, and how its calls are written and parsed.

Each other file in this folder is one syntax; its file name is the value of `tool_format`. `parse(write(calls))` returns
the calls unless the wire format cannot represent them; the docstring of the file says so.

A tool is a JSON object with name, description and parameters (a JSON Schema), bare or as the `function` of an object of
type `function`, or with this type beside its name, as in OpenAI's Responses API. A key that is null says nothing.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import isfinite
from typing import Any, Protocol

from luthier.data.types import ToolCall

Tool = Mapping[str, Any]


class Parse(Protocol):
    def __call__(self, text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSyntax:
    name: str
    describe: Callable[[Sequence[Tool], date], str]
    """(tools, today) -> the text after the system text."""
    write: Callable[[Sequence[ToolCall]], str]
    """The text of one or more calls. Raises `RowError` for calls that the wire format cannot represent."""
    parse: Parse
    """(text, tools) -> the calls in the text, or None if it has none or invalid ones. The tools, if given, provide the
    types of arguments where the wire format does not."""
    after_text: str = ""
    """The separator between text or a thought and the first call."""


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def bare(tool: Tool) -> Tool:
    """The function object itself. Raises `KeyError` for a tool of type `function` that holds none."""
    if isinstance(tool.get("function"), Mapping):
        return tool["function"]
    if tool.get("type") != "function":
        return tool
    if "name" not in tool:
        raise KeyError("function")
    return {key: value for key, value in tool.items() if key != "type"}


def wrapped(tool: Tool) -> Tool:
    """The function object inside an object of type `function`. Raises `KeyError` as `bare` does."""
    if isinstance(tool.get("function"), Mapping):
        return {"type": "function"} | dict(tool) | {"type": "function"}
    return {"type": "function", "function": bare(tool)}


def schema_of(value: Any) -> Mapping[str, Any]:
    """A JSON Schema. One that is null, true or false says nothing."""
    return value if isinstance(value, Mapping) else {}


def call_from(value: Any, arguments_key: str = "arguments") -> ToolCall | None:
    """The call in a JSON object, or None if it is not one."""
    match value:
        case {"name": str(name), **rest}:
            arguments = rest.get(arguments_key)
            return ToolCall(name, arguments) if isinstance(arguments, dict) else None
    return None


def calls_from(values: Iterable[Any], arguments_key: str = "arguments") -> list[ToolCall] | None:
    """The calls in JSON objects, or None if there are none or one is not a call."""
    calls = [call_from(value, arguments_key) for value in values]
    good = [call for call in calls if call is not None]
    return good if good and len(good) == len(calls) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")


def finite(text: str) -> float:
    """The number that JSON text writes. Raises `ValueError` for one that would become infinity."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is beyond all floats")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=finite)
"""Python's own would read NaN, Infinity and 1e999, which no client of the API could read again."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a surrogate pair in JSON, which need not be followed by the other half."""


def _encodable(value: Any, text: str) -> Any:
    """The value that was read from `text`. Raises `ValueError` if a text in it is none that can be written."""
    if _HALF.search(text):
        dump(value).encode()
    return value


def read_value(text: str, at: int) -> tuple[Any, int]:
    """(the JSON value that begins at `at`, its end). Raises `ValueError`, also for lists without end: a model that
    repeats itself writes some."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError as fault:
        raise ValueError("it is nested too deep") from fault
    return _encodable(value, text[at:end]), end


def loads(text: str) -> Any:
    """The JSON value of a text, or None if it is not JSON (no call is the JSON value null)."""
    try:
        return _encodable(_DECODER.decode(text), text)
    except (ValueError, RecursionError):
        return None


def spans(text: str, opening: str, closing: str) -> list[Any] | None:
    """The JSON value between each pair of tags; None for a text without tags or with something else between them.

    The JSON is decoded from the opening tag on, so tags inside its strings are no problem.
    """
    values, at = [], text.find(opening)
    while at >= 0:
        body = text[at + len(opening) :].lstrip()
        try:
            value, end = read_value(body, 0)
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
    """An argument in a wire format with strings without quotes and everything else as JSON."""
    return value if isinstance(value, str) else dump(value)


def value_from(text: str, name: str, argument: str, tools: Sequence[Tool]) -> Any:
    """The argument for such a text: a string if the schema of the tool says so, else JSON.

    Without a schema a text that looks like a number becomes a number.
    """
    if "string" in _types(name, argument, tools):
        return text
    try:
        return _encodable(_DECODER.decode(text), text)
    except (ValueError, RecursionError):
        return text


def _types(name: str, argument: str, tools: Sequence[Tool]) -> Sequence[Any]:
    """The types that the schema of a tool allows for an argument; empty if it says nothing."""
    schema: Any = next((tool.get("parameters") for tool in map(bare, tools) if tool["name"] == name), None)
    for key in ("properties", argument, "type"):
        schema = schema_of(schema).get(key)
    return schema if isinstance(schema, list) else [schema]


def read_tagged(
    text: str, tools: Sequence[Tool], *, opening: re.Pattern[str], argument: re.Pattern[str], closing: re.Pattern[str]
) -> list[ToolCall] | None:
    """The calls of a syntax with tags: `opening` captures the name, `argument` a key and the text of its value.

    It scans tag by tag, so a truncated text takes no more time than a complete one.
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
