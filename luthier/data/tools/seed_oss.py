"""Seed-OSS: <function=name> with one <parameter=key> each, between <seed:tool_call> tags.

Deviates from LLaMA-Factory, whose opening tag lacked its `>` and which parsed well-formed calls with a `>` in the name.
As in the model's published chat template, every call has a line of its own.

Strings are written without quotes: see `value_from` for their types. A value cannot hold `</parameter>`.
"""

import re
from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, dump, read_tagged, value_text
from luthier.data.types import ToolCall

_OPENING = re.compile(r"<seed:tool_call>\s*<function=([^>\n]+)>\s*")
_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)
_CLOSING = re.compile(r"</function>\s*</seed:tool_call>")


def describe(tools: Sequence[Tool], today: date) -> str:
    return (
        "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the user "
        "query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). Before "
        "performing any task, you must decide how to call them based on the descriptions and parameters of these "
        f"tools.\n{dump(list(tools))}\n"
        "工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
        "<parameter=example_parameter_1>value_1</parameter>\n"
        "<parameter=example_parameter_2>This is the value for the second parameter\nthat can span\nmultiple lines"
        "</parameter>\n</function>\n</seed:tool_call>\n"
    )


def _call(call: ToolCall) -> str:
    lines = "".join(f"<parameter={key}>{value_text(value)}</parameter>\n" for key, value in call.arguments.items())
    return f"<seed:tool_call>\n<function={call.name}>\n{lines}</function>\n</seed:tool_call>"


def write(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_call, calls))


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    return read_tagged(text, tools, opening=_OPENING, argument=_ARGUMENT, closing=_CLOSING)


SYNTAX = ToolSyntax(name="seed_oss", describe=describe, write=write, parse=parse, after_text="\n")
