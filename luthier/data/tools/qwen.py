"""Qwen 2.5 and 3, and many after them (Hermes): one JSON object per call between <tool_call> tags."""

from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, calls_from, dump, spans, wrapped
from luthier.data.types import ToolCall


def describe_body(tools: Sequence[Tool]) -> str:
    """The text without the blank line before it."""
    lines = "".join(f"\n{dump(wrapped(tool))}" for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def describe(tools: Sequence[Tool], today: date) -> str:
    return "\n\n" + describe_body(tools)


def write(calls: Sequence[ToolCall]) -> str:
    objects = [dump({"name": call.name, "arguments": call.arguments}) for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    return calls_from(spans(text, "<tool_call>", "</tool_call>") or ())


SYNTAX = ToolSyntax(name="qwen", describe=describe, write=write, parse=parse)
