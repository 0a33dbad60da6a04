"""GLM 4.5 and later: the name and pairs of <arg_key> and <arg_value> between <tool_call> tags.

Deviates from LLaMA-Factory, which left out the closing tag and parsed calls as JSON, so it could never parse its own.
As in the published chat template of GLM 4.5, every call begins on a new line and ends with </tool_call>. GLM 4.7 writes
the same without line breaks; both are parsed.

Strings are written without quotes: see `value_from` for their types. A value cannot hold `</arg_value>`.
"""

import re
from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, dump, read_tagged, value_text, wrapped
from luthier.data.types import ToolCall

_OPENING = re.compile(r"<tool_call>\s*([^<\s]+)\s*")
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_CLOSING = re.compile(r"</tool_call>")


def describe(tools: Sequence[Tool], today: date) -> str:
    lines = "".join(f"\n{dump(wrapped(tool))}" for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
        "For each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
    )


def _call(call: ToolCall) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value_text(value)}</arg_value>\n"
        for key, value in call.arguments.items()
    )
    return f"\n<tool_call>{call.name}\n{pairs}</tool_call>"


def write(calls: Sequence[ToolCall]) -> str:
    return "".join(map(_call, calls))


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    return read_tagged(text, tools, opening=_OPENING, argument=_ARGUMENT, closing=_CLOSING)


SYNTAX = ToolSyntax(name="glm4_moe", describe=describe, write=write, parse=parse)
