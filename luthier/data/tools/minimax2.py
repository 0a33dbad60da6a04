"""MiniMax M2: <invoke> elements with one <parameter> each, inside <minimax:tool_call>.

Deviates from LLaMA-Factory, which wrote no enclosing tag but required one when parsing. As in the
model's published chat template, all calls of an answer are in one enclosing tag, on a new line.

Strings are written without quotes: see `value_from` for their types. A value cannot hold `</parameter>`.
"""

import re
from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, bare, dump, read_tagged, value_text
from luthier.data.types import ToolCall

_OPENING = re.compile(r'<invoke name="([^"]*)">\s*')
_ARGUMENT = re.compile(r'<parameter name="([^"]*)">(.*?)</parameter>\s*', re.DOTALL)
_CLOSING = re.compile(r"</invoke>")


def describe(tools: Sequence[Tool], today: date) -> str:
    lines = "".join(f"<tool>{dump(bare(tool))}</tool>\n" for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
        f"Here are the tools available in JSONSchema format:\n\n<tools>\n{lines}</tools>\n\n"
        "When making tool calls, use XML format to invoke tools and pass parameters:\n\n"
        '<minimax:tool_call>\n<invoke name="tool-name-1">\n'
        '<parameter name="param-key-1">param-value-1</parameter>\n'
        '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
    )


def _invoke(call: ToolCall) -> str:
    lines = "".join(f'<parameter name="{k}">{value_text(v)}</parameter>\n' for k, v in call.arguments.items())
    return f'<invoke name="{call.name}">\n{lines}</invoke>\n'


def write(calls: Sequence[ToolCall]) -> str:
    return f"\n<minimax:tool_call>\n{''.join(map(_invoke, calls))}</minimax:tool_call>"


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    _, _, rest = text.partition("<minimax:tool_call>")
    return read_tagged(rest, tools, opening=_OPENING, argument=_ARGUMENT, closing=_CLOSING)


SYNTAX = ToolSyntax(name="minimax2", describe=describe, write=write, parse=parse)
