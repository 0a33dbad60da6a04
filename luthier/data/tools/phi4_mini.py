"""Phi-4-mini: the tools as a JSON list between <|tool|> tags, the calls as a JSON list between <|tool_call|> tags.

Deviates from LLaMA-Factory, which wrote the calls in the default syntax and could not parse them. The
model's published chat template has the tools; its tokenizer has the tokens for the calls.
"""

from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax, bare, calls_from, dump, spans
from luthier.data.types import ToolCall


def describe(tools: Sequence[Tool], today: date) -> str:
    return f"<|tool|>{dump([bare(tool) for tool in tools])}<|/tool|>"


def write(calls: Sequence[ToolCall]) -> str:
    return f"<|tool_call|>{dump([{'name': call.name, 'arguments': call.arguments} for call in calls])}<|/tool_call|>"


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    values = spans(text, "<|tool_call|>", "<|/tool_call|>") or ()
    return calls_from(call for value in values for call in (value if isinstance(value, list) else [value]))


SYNTAX = ToolSyntax(name="phi4_mini", describe=describe, write=write, parse=parse)
