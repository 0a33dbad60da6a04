"""Gemma 4: `call:name{key:value,...}` between <|tool_call> and <tool_call|>; strings between two <|"|>, keys sorted.

A string cannot hold <|"|>, a key none of `:,{}[]<`. As in LLaMA-Factory, the description leaves `enum` out.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from luthier.data.tools import Tool, ToolSyntax, bare, dump, read_value, schema_of
from luthier.data.types import ToolCall

_QUOTE = '<|"|>'
_CALL = re.compile(r"<\|tool_call>\s*call:([^{\s]+)(?=\{)")
_KEY = re.compile(r"\s*([^:,{}\[\]<]*):")
_NUMBER_OR_WORD = re.compile(r"[^,{}\[\]<\s]+")


def _quoted(text: str) -> str:
    return f"{_QUOTE}{text}{_QUOTE}"


def _value(value: Any) -> str:
    match value:
        case str():
            return _quoted(value)
        case dict():
            return f"{{{','.join(f'{key}:{_value(value[key])}' for key in sorted(value))}}}"
        case list():
            return f"[{','.join(map(_value, value))}]"
    return dump(value)


def _type(schema: Mapping[str, Any]) -> Any:
    kind = schema.get("type") or ""
    return kind.upper() if isinstance(kind, str) else [word.upper() for word in kind]


def _schema(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in sorted order, its types in capitals."""
    parts = []
    if schema.get("description"):
        parts.append(f"description:{_quoted(schema['description'])}")
    if schema.get("items"):
        parts.append(f"items:{_schema(schema_of(schema['items']))}")
    if schema.get("nullable"):
        parts.append("nullable:true")
    if properties := schema_of(schema.get("properties")):
        members = (f"{key}:{_schema(schema_of(properties[key]))}" for key in sorted(properties))
        parts.append(f"properties:{{{','.join(members)}}}")
    if schema.get("required"):
        parts.append(f"required:{_value(schema['required'])}")
    return f"{{{','.join([*parts, f'type:{_value(_type(schema))}'])}}}"


def describe(tools: Sequence[Tool], today: date) -> str:
    return "\n".join(
        f"declaration:{tool['name']}{{description:{_quoted(tool.get('description') or '')}"
        + (f",parameters:{_schema(tool['parameters'])}" if schema_of(tool.get("parameters")) else "")
        + "}"
        for tool in map(bare, tools)
    )


def write(calls: Sequence[ToolCall]) -> str:
    return "".join(f"<|tool_call>call:{call.name}{_value(call.arguments)}<tool_call|>" for call in calls)


def _read(text: str, at: int) -> tuple[Any, int]:
    """(value, end) of the value that begins at `at`. Raises `ValueError` if there is none."""
    if text.startswith(_QUOTE, at):
        end = text.index(_QUOTE, at + len(_QUOTE))
        return text[at + len(_QUOTE) : end], end + len(_QUOTE)
    opening = text[at : at + 1]
    if opening not in ("{", "["):
        word = _NUMBER_OR_WORD.match(text, at)
        value, end = read_value(text, at)
        if word is None or end != word.end():
            raise ValueError
        return value, end
    values: list[Any] = []
    keys: list[str] = []
    closing = "}" if opening == "{" else "]"
    at += 1
    while not text.startswith(closing, at):
        if values:
            if not text.startswith(",", at):
                raise ValueError
            at += 1
        if opening == "{":
            key = _KEY.match(text, at)
            if key is None:
                raise ValueError
            keys.append(key[1])
            at = key.end()
        value, at = _read(text, at)
        values.append(value)
    return (dict(zip(keys, values, strict=True)) if opening == "{" else values), at + 1


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    calls, at = [], 0
    while head := _CALL.search(text, at):
        try:
            arguments, at = _read(text, head.end())
        except (ValueError, RecursionError):
            return None
        calls.append(ToolCall(head[1], arguments))
    return calls or None


SYNTAX = ToolSyntax(name="gemma4", describe=describe, write=write, parse=parse)
