"""Conversations for comparing two renderings. Each has a feature that chat formats treat differently."""

import json
from dataclasses import dataclass

from luthier.data.types import Dialogue, Message


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    dialogue: Dialogue
    enable_thinking: bool | None = True


def _talk(*contents: str, system: str | None = None) -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue(tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)), system)  # type: ignore[arg-type]


def _thought(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
_CALL = {"name": "get_weather", "arguments": {"city": "München", "days": 2}}
_WITH_TOOLS = Dialogue(
    (
        Message("user", "Will it rain in München?"),
        Message("function", json.dumps(_CALL, ensure_ascii=False)),
        Message("observation", '{"rain": true}'),
        Message("assistant", "Yes, take an umbrella."),
    ),
    tools=json.dumps(_TOOLS),
)
_THOUGHTS = _talk(
    "What is 2+2?", _thought("Two and two.", "4"), "And 3+3?", _thought("Three and three.", "6"), system="Think first."
)

SAMPLES = (
    Sample("single", _talk("What is the capital of France?", "Paris.")),
    Sample("system", _talk("Hi", "Hello.", system="Be brief.")),
    Sample("multi-turn", _talk("Hi", "Hello.", "How are you?", "Well, thanks.", "Bye", "Bye!")),
    Sample("multi-turn, system", _talk("Hi", "Hello.", "Bye", "Bye!", system="Be brief.")),
    Sample("thinking on", _THOUGHTS),
    Sample("thinking off", _THOUGHTS, enable_thinking=False),
    Sample("no thoughts, thinking off", _talk("Hi", "Hello."), enable_thinking=False),
    Sample("tools", _WITH_TOOLS),
    Sample("special characters", _talk("a\tb\\n \"c\" {{d}} <b>&amp;</b>\n\n```\nx = 'é'\n```", "🙂 naïve – 1\u00a0%")),
    Sample("blanks around", _talk("  two blanks before\n", "two blanks and a line behind  \n")),
    Sample("Chinese", _talk("你好,请介绍一下北京。", "北京是中国的首都。", "谢谢!", "不客气。")),
)

SHORT = tuple(sample for sample in SAMPLES if sample.name in ("single", "multi-turn, system"))
"""For the check at the start of a run."""
