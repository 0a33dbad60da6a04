"""Ling 2 (Bailing): calls as in Qwen; the tool list ends with the switch that turns thinking off."""

from collections.abc import Sequence
from datetime import date

from luthier.data.tools import Tool, ToolSyntax
from luthier.data.tools.qwen import describe_body, parse, write


def describe(tools: Sequence[Tool], today: date) -> str:
    return f"{describe_body(tools)}\ndetailed thinking off"


SYNTAX = ToolSyntax(name="ling", describe=describe, write=write, parse=parse)
