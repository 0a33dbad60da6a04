"""Grammars that hold an answer to JSON or to a tool call, for `response_format` and `tool_choice`."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from luthier.core.errors import InvalidInput
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.types import ToolCall
from luthier.serve.errors import ApiError
from luthier.serve.protocol import ChatRequest, NamedTool, ResponseFormat

_MARK = "\N{WHITE SQUARE}"
"""Stands for name and arguments while the syntax writes a call."""


def forced_grammar(request: ChatRequest, syntax: str, special: Collection[str] = ()) -> str | None:
    """The grammar that an answer must follow; None if it may be anything.

    `syntax`: of the model's tool calls. `special`: the texts of special tokens. Raises `ApiError` for a grammar that
    cannot be held.
    """
    functions = called(request)
    if functions:
        return _tool_grammar(functions, syntax, special, several=request.parallel_tool_calls is not False)
    if request.response_format is not None:
        return _format_grammar(request.response_format)
    return None


def called(request: ChatRequest) -> list[Mapping[str, Any]]:
    """The functions of which the answer must call one; empty if it need not. Raises `ApiError` for an unknown one."""
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return []
    functions: list[Mapping[str, Any]] = [tool.function.as_given for tool in request.tools or ()]
    if isinstance(choice, NamedTool):
        name = choice.function.name
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ApiError(f"tool_choice: no tool is called {name!r}", param="tool_choice")
    if not functions:
        raise ApiError("tool_choice: there are no tools to choose from", param="tool_choice")
    return functions


def _format_grammar(wanted: ResponseFormat) -> str | None:
    from luthier.infer.grammar import ANY_OBJECT, json_grammar

    if wanted.type == "text":
        return None
    schema: Mapping[str, Any] = ANY_OBJECT
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise ApiError("response_format: json_schema needs a schema", param="response_format.json_schema.schema")
        schema = wanted.json_schema.schema_
    param = "response_format.json_schema.schema" if wanted.type == "json_schema" else "response_format"
    try:
        return json_grammar(schema)
    except InvalidInput as fault:
        raise ApiError(f"response_format: {fault}", param=param) from fault


def _tool_grammar(
    functions: Sequence[Mapping[str, Any]], syntax: str, special: Collection[str], *, several: bool
) -> str:
    from luthier.infer.grammar import lark_grammar

    try:
        return lark_grammar(call_grammar(functions, syntax, special, several=several))
    except InvalidInput as fault:
        raise ApiError(f"tools: {fault}", param="tools") from fault


def call_grammar(
    functions: Sequence[Mapping[str, Any]], syntax: str, special: Collection[str] = (), *, several: bool
) -> str:
    """A Lark grammar of one call, or with `several` of one or more, as the syntax writes them.

    Raises `ApiError` for a syntax that does not write arguments as JSON.
    """
    written = _frame(syntax)
    if written is None:
        raise ApiError(
            f"tool_choice: the tool-call syntax {syntax} of this model does not write arguments as JSON, so a call"
            " cannot be forced -> use tool_choice: auto",
            param="tool_choice",
        )
    before, between, after, join = written
    rules = []
    for number, function in enumerate(functions):
        schema = json.dumps(function.get("parameters") or {"type": "object"}, ensure_ascii=False)
        name = json.dumps(function["name"], ensure_ascii=False)[1:-1] if between.startswith('"') else function["name"]
        opening, closing = _literal(before + name + between, special), _literal(after, special)
        rules.append(f"call_{number}: {opening} arguments_{number} {closing}".rstrip())
        rules.append(f"arguments_{number}: %json {schema}")
    choices = " | ".join(f"call_{number}" for number in range(len(functions)))
    more = f" ({_literal(join, special)} call)*" if several and join is not None else ""
    return "\n".join([f"start: call{more}", f"call: {choices}", *rules])


def _frame(syntax: str) -> tuple[str, str, str, str | None] | None:
    """(before the name, between name and arguments, after the arguments, between two calls).

    None for a syntax without JSON. The last part is None where several calls are more than one call after the other.
    """
    write = TOOL_SYNTAXES.get(syntax).write
    one = write([ToolCall(_MARK, {})]).replace(json.dumps(_MARK), f'"{_MARK}"')
    before, mark, rest = one.partition(_MARK)
    between, arguments, after = rest.partition("{}")
    if not mark or not arguments or not re.search(r"[:\n] ?$", between):
        return None
    with_value = write([ToolCall(_MARK, {"a": "b"})])
    if json.dumps({"a": "b"}) not in with_value:
        return None
    try:
        two = write([ToolCall(_MARK, {})] * 2)
    except ValueError:  # one call only
        return before, between, after, None
    middle = two.removeprefix(one)
    join = middle.removesuffix(one) if two.startswith(one) and middle.endswith(one) else None
    return before, between, after, join


def _literal(text: str, special: Collection[str]) -> str:
    """A text in Lark's notation; special tokens in it stand for themselves, since their text is not spelled out."""
    tags = [token for token in special if re.fullmatch(r"<[^<>\s]+>", token)]
    if not tags:
        return json.dumps(text, ensure_ascii=False) if text else ""
    parts = re.split(f"({'|'.join(map(re.escape, tags))})", text)
    return " ".join(part if part in tags else json.dumps(part, ensure_ascii=False) for part in parts if part)
