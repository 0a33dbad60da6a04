"""Mistral 7B v0.3 and later: a JSON list of calls. The format's slot puts [TOOL_CALLS] before it."""

from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, calls_from, dump, loads, wrapped
from luthier.data.types import ToolCall


def describe(tools: Sequence[Tool], today: date) -> str:
    return f"[AVAILABLE_TOOLS] {dump([wrapped(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def write(calls: Sequence[ToolCall]) -> str:
    return dump([{"name": call.name, "arguments": call.arguments} for call in calls])


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    value = loads(text.strip().removeprefix("[TOOL_CALLS]"))
    return calls_from(value if isinstance(value, list) else [value])


SYNTAX = ToolSyntax(name="mistral", describe=describe, write=write, parse=parse)
