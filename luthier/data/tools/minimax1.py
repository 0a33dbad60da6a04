"""MiniMax M1: one JSON object a line between <tool_calls> tags."""

from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, bare, calls_from, dump, read_value
from luthier.data.types import ToolCall


def describe(tools: Sequence[Tool], today: date) -> str:
    lines = "".join(f"{dump(bare(tool))}\n" for tool in tools)
    return (
        f"You are provided with these tools:\n<tools>\n{lines}</tools>\n\n"
        "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and "
        "json-object of arguments, following the format below:\n<tool_calls>\n"
        '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
    )


def write(calls: Sequence[ToolCall]) -> str:
    lines = "\n".join(dump({"name": call.name, "arguments": call.arguments}) for call in calls)
    return f"<tool_calls>\n{lines}\n</tool_calls>"


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    _, opening, rest = text.partition("<tool_calls>")
    values, rest = [], rest.lstrip()
    while opening and not rest.startswith("</tool_calls>"):
        try:
            value, end = read_value(rest, 0)
        except ValueError:
            return None
        values.append(value)
        rest = rest[end:].lstrip()
    return calls_from(values)


SYNTAX = ToolSyntax(name="minimax1", describe=describe, write=write, parse=parse)
