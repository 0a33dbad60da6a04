"""Llama 3.1 and later, JSON calls: {"name": ..., "parameters": {...}}, a list of them for several calls.

As in Meta's prompt format, the description contains today's date; so the text of a conversation with tools changes
daily. https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

import json
from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, calls_from, dump, loads, wrapped
from luthier.data.types import ToolCall


def describe(tools: Sequence[Tool], today: date) -> str:
    objects = "".join(json.dumps(wrapped(tool), indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {today:%d %b %Y}\n\n"
        "You have access to the following functions. To call a function, please respond with JSON for a function call. "
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
        f"Do not use variables.\n\n{objects}"
    )


def write(calls: Sequence[ToolCall]) -> str:
    objects = [{"name": call.name, "parameters": call.arguments} for call in calls]
    return dump(objects[0] if len(objects) == 1 else objects)


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    value = loads(text.strip().removeprefix("<|python_tag|>"))
    return calls_from(value if isinstance(value, list) else [value], "parameters")


SYNTAX = ToolSyntax(name="llama3", describe=describe, write=write, parse=parse)
