"""Qwen 3.5 and 3.6 (and Qwen 3 Coder): <function=name> with one <parameter=key> each, between <tool_call> tags.

Strings are written without quotes: see `value_from` for their types. Exactly one line break on either side of a value
belongs to the format. A value cannot hold a line break followed by `</parameter>`.
"""

import re
from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, bare, dump, read_tagged, value_text
from luthier.data.types import ToolCall

_OPENING = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*")
_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\s*", re.DOTALL)
_CLOSING = re.compile(r"</function>\s*</tool_call>")


def describe(tools: Sequence[Tool], today: date) -> str:
    lines = "".join(f"\n{dump(bare(tool))}" for tool in tools)
    return (
        f"\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>{lines}\n</tools>\n\n"
        "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
        "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
        "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
        "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested "
        "within <tool_call></tool_call> XML tags\n"
        "- Required parameters MUST be specified\n"
        "- You may provide optional reasoning for your function call in natural language BEFORE the function call, "
        "but NOT after\n"
        "- If there is no function call available, answer the question like normal with your current knowledge and do "
        "not tell the user about function calls\n</IMPORTANT>"
    )


def _call(call: ToolCall) -> str:
    lines = "".join(f"<parameter={k}>\n{value_text(v)}\n</parameter>\n" for k, v in call.arguments.items())
    return f"<tool_call>\n<function={call.name}>\n{lines}</function>\n</tool_call>"


def write(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_call, calls))


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    return read_tagged(text, tools, opening=_OPENING, argument=_ARGUMENT, closing=_CLOSING)


SYNTAX = ToolSyntax(name="qwen3_5", describe=describe, write=write, parse=parse)
