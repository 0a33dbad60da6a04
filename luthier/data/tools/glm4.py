"""ChatGLM 3 and GLM 4: the name on the first line, the JSON of the arguments below it.

The wire format holds only one call. Its name consists of letters, digits, `_`, `.` and `-`: otherwise any answer of two
lines whose second is JSON would be a call.
"""

import json
import re
from collections.abc import Sequence
from datetime import date

from luthier.core.errors import RowError
from luthier.data.tools import Tool, ToolSyntax, bare, dump, loads
from luthier.data.types import ToolCall

_NAME = re.compile(r"[\w.-]+")


def describe(tools: Sequence[Tool], today: date) -> str:
    sections = "".join(
        f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in map(bare, tools)
    )
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        f"你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{sections}"
    )


def write(calls: Sequence[ToolCall]) -> str:
    if len(calls) != 1:
        raise RowError(f"the tool syntax glm4 writes one call in an answer, this one has {len(calls)}")
    return f"{calls[0].name}\n{dump(calls[0].arguments)}"


def parse(text: str, tools: Sequence[Tool] = ()) -> list[ToolCall] | None:
    name, _, rest = text.strip().partition("\n")
    arguments = loads(rest)
    return [ToolCall(name, arguments)] if _NAME.fullmatch(name) and isinstance(arguments, dict) else None


SYNTAX = ToolSyntax(name="glm4", describe=describe, write=write, parse=parse)
