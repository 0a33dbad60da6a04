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
    several = request.parallel_tool_calls is not False
    functions = called(request)
    if functions:
        return _tool_grammar(functions, syntax, special, several=several)
    if request.response_format is None or request.response_format.type == "text":
        return None
    schema = _schema(request.response_format)
    grammar = _format_grammar(request.response_format.type, schema)
    if not request.tools or request.tool_choice == "none":
        return grammar
    # The format is one of text. An answer may call a tool instead, which a grammar of JSON alone would rule out.
    functions = [tool.function.as_given for tool in request.tools]
    return _tool_grammar(functions, syntax, special, several=several, instead=schema)


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


def _schema(wanted: ResponseFormat) -> Mapping[str, Any]:
    from luthier.infer.grammar import ANY_OBJECT

    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError("response_format: json_schema needs a schema", param="response_format.json_schema.schema")
    return wanted.json_schema.schema_


def _format_grammar(kind: str, schema: Mapping[str, Any]) -> str:
    from luthier.infer.grammar import json_grammar

    param = "response_format.json_schema.schema" if kind == "json_schema" else "response_format"
    try:
        return json_grammar(schema)
    except InvalidInput as fault:
        raise ApiError(f"response_format: {fault}", param=param) from fault


def _tool_grammar(
    functions: Sequence[Mapping[str, Any]],
    syntax: str,
    special: Collection[str],
    *,
    several: bool,
    instead: Mapping[str, Any] | None = None,
) -> str:
    from luthier.infer.grammar import lark_grammar

    try:
        return lark_grammar(call_grammar(functions, syntax, special, several=several, instead=instead))
    except InvalidInput as fault:
        raise ApiError(f"tools: {fault}", param="tools") from fault


def call_grammar(
    functions: Sequence[Mapping[str, Any]],
    syntax: str,
    special: Collection[str] = (),
    *,
    several: bool,
    instead: Mapping[str, Any] | None = None,
) -> str:
    """A Lark grammar of one call, or with `several` of one or more, as the syntax writes them; or of the JSON texts
    that the schema `instead` describes.

    Raises `ApiError` for a syntax that does not write arguments as JSON.
    """
    written = _frame(syntax)
    if written is None:
        raise ApiError(
            f"tool_choice: the tool-call syntax {syntax} of this model does not write arguments as JSON, so a call"
            " cannot be held to a grammar -> use tool_choice: auto without response_format, or none with it",
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
    if instead is not None:
        if before.startswith("{"):
            raise ApiError(
                f"response_format: the tool-call syntax {syntax} of this model writes a call as a JSON object, which"
                " cannot be told from the answer -> set tool_choice: none, or leave out response_format",
                param="response_format",
            )
        more += " | text"
        rules.append(f"text: %json {json.dumps(instead, ensure_ascii=False)}")
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
