"""Plain ReAct prompts, `Action: name` and `Action Input: {json}`: for models without a syntax of their own."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from luthier.data.tools import Tool, ToolSyntax, bare, dump, read_value, schema_of
from luthier.data.types import ToolCall

_CALL = re.compile(r"Action:[ \t]*(\S[^\n]*?)[ \t]*\nAction Input:\s*")


def _parameter(name: str, schema: Mapping[str, Any], required: bool) -> str:
    enum = f", should be one of [{', '.join(map(str, schema['enum']))}]" if schema.get("enum") else ""
    inner = schema_of(schema.get("items")).get("type") or ""
    items = f", where each item should be {inner}" if schema.get("items") else ""
    kind = f"{schema.get('type') or ''}{', required' if required else ''}"
    return f"  - {name} ({kind}): {schema.get('description') or ''}{enum}{items}\n"


def _tool(tool: Tool) -> str:
    schema = schema_of(tool.get("parameters"))
    required = schema.get("required") or ()
    members = schema_of(schema.get("properties")).items()
    parameters = "".join(_parameter(name, schema_of(member), name in required) for name, member in members)
    description = tool.get("description") or ""
    return f"> Tool Name: {tool['name']}\nTool Description: {description}\nTool Args:\n{parameters}\n"


def describe(tools: Sequence[Tool], today: date) -> str:
    functions = [bare(tool) for tool in tools]
    return (
        f"You have access to the following tools:\n{''.join(map(_tool, functions))}"
        "Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{', '.join(f['name'] for f in functions)}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def write(calls: Sequence[ToolCall]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {dump(call.arguments)}" for call in calls)


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    calls, at = [], 0
    while match := _CALL.search(text, at):
        try:
            arguments, at = read_value(text, match.end())
        except ValueError:
            return None
        if not isinstance(arguments, dict):
            return None
        calls.append(ToolCall(match[1], arguments))
    return calls or None


SYNTAX = ToolSyntax(name="default", describe=describe, write=write, parse=parse)
