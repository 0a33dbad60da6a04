"""LFM 2: a Python list of calls, `[f(a="x", n=1)]`, between <|tool_call_start|> and <|tool_call_end|>.

Deviates from LLaMA-Factory, which put quotes around strings without escaping what is inside, and mixed JSON's `true`
into Python lists. Here every value is a Python literal. JSON's `true`, `false` and `null` are parsed as well, since
models write them.

An argument whose name is not a Python identifier is written `**{"name": value}`, which is Python too.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

from luthier.data.tools import Tool, ToolSyntax, bare, dump
from luthier.data.types import ToolCall

_NAME = re.compile(r"\s*([^\s(\[\]{},\"']+)\s*\(\s*")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_KEY = re.compile(rf"({_IDENTIFIER.pattern})\s*=\s*")
_COMMA = re.compile(r"\s*,\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)
_WORDS = {"true": True, "false": False, "null": None}


def describe(tools: Sequence[Tool], today: date) -> str:
    return f"List of tools: <|tool_list_start|>{dump([bare(tool) for tool in tools])}<|tool_list_end|>"


def _literal(value: Any) -> str:
    """A Python literal with double quotes. A JSON string without escaped slashes is one."""
    match value:
        case str():
            return dump(value)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return f"{{{', '.join(f'{dump(k)}: {_literal(v)}' for k, v in value.items())}}}"
    return repr(value)


def _call(call: ToolCall) -> str:
    arguments = (
        f"{key}={_literal(value)}" if _IDENTIFIER.fullmatch(key) else f"**{_literal({key: value})}"
        for key, value in call.arguments.items()
    )
    return f"{call.name}({', '.join(arguments)})"


def write(calls: Sequence[ToolCall]) -> str:
    return f"<|tool_call_start|>[{', '.join(map(_call, calls))}]<|tool_call_end|>"


class _Broken(ValueError):
    """Not a list of calls."""


def _end_of_value(text: str, at: int) -> int:
    """The end of the value that begins at `at`: before the next comma or closing bracket outside of it."""
    depth = 0
    while at < len(text):
        if string := _STRING.match(text, at):
            at = string.end()
            continue
        if text[at] in ",)]}" and depth == 0:
            return at
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    raise _Broken


def _value(text: str) -> Any:
    """The JSON value that a Python literal writes. Raises `_Broken` for one that JSON does not have, such as a set."""
    try:
        return json.loads(json.dumps(_plain(ast.parse(text.strip(), mode="eval").body), allow_nan=False))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:  # the last two: nested too deep
        raise _Broken from error


def _plain(node: ast.expr | None) -> Any:
    match node:
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.List(elts=items):
            return [_plain(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_plain(key): _plain(value) for key, value in zip(keys, values, strict=True)}
    if node is None:  # the key of {**others}
        raise _Broken
    return ast.literal_eval(node)


def _calls(text: str) -> Iterator[ToolCall]:
    """Parsed by hand up to the values, since names with a hyphen and arguments like `from` are not Python."""
    at = 0
    while head := _NAME.match(text, at):
        arguments: dict[str, Any] = {}
        at = head.end()
        while not text.startswith(")", at):
            key = _KEY.match(text, at)
            if key is None and not text.startswith("**", at):
                raise _Broken
            start = key.end() if key else at + 2
            at = _end_of_value(text, start)
            value = _value(text[start:at])
            if key is None and not isinstance(value, dict):
                raise _Broken
            arguments.update({key[1]: value} if key else value)
            if comma := _COMMA.match(text, at):
                at = comma.end()
            elif not text.startswith(")", at):
                raise _Broken
        yield ToolCall(head[1], arguments)
        at += 1
        if comma := _COMMA.match(text, at):
            at = comma.end()
    if text[at:].strip():
        raise _Broken


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    _, opening, rest = text.partition("<|tool_call_start|>")
    body = rest.rpartition("<|tool_call_end|>")[0].strip()
    if not opening or not body:
        return None
    if body.startswith("[") and body.endswith("]"):
        body = body[1:-1]
    try:
        return list(_calls(body)) or None
    except _Broken:
        return None


SYNTAX = ToolSyntax(name="lfm2", describe=describe, write=write, parse=parse)
