"""Conversations for comparing two renderings. Each has a feature that chat formats treat differently."""

import json
from dataclasses import dataclass, replace

from luthier.data.types import PLACE, Dialogue, Media, Message, ToolCall, ToolResult


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


def _calls(*cities: str, beside: str = "", thought: str = "") -> Message:
    """Ids of nine letters and digits are accepted by every chat template."""
    calls = (ToolCall("get_weather", {"city": city, "days": 2}, f"{city[:4].lower()}calls") for city in cities)
    return Message("function", beside, thought=thought, calls=tuple(calls))


def _results(**by_id: str) -> Message:
    results = tuple(ToolResult(text, call_id) for call_id, text in by_id.items())
    return Message("observation", "\n".join(by_id.values()), results=results)


_WITH_TOOLS = Dialogue(
    (
        Message("user", "Will it rain in Oslo?"),
        _calls("Oslo"),
        _results(oslocalls='{"rain": true}'),
        Message("assistant", "Yes, take an umbrella."),
    ),
    tools=json.dumps(_TOOLS),
)
_PARALLEL = Dialogue(
    (
        Message("user", "Rome or Bern?"),
        _calls("Rome", "Bern"),
        _results(romecalls="sunny", berncalls="rainy"),
        Message("assistant", "Rome."),
    ),
    tools=json.dumps(_TOOLS),
)
_BESIDE = Dialogue(
    (
        Message("user", "How is Rome?"),
        _calls("Rome", beside="Let me look."),
        _results(romecalls="sunny"),
        Message("assistant", "Sunny."),
    ),
    tools=json.dumps(_TOOLS),
)
_STEPS = Dialogue(
    (
        Message("user", "How is Rome?"),
        _calls("Rome", thought="A call will tell."),
        _results(romecalls="sunny"),
        Message("assistant", "Sunny.", thought="It is sunny."),
    ),
    tools=json.dumps(_TOOLS),
)
_APART = Dialogue(
    (
        Message("user", "What is 2+2?"),
        Message("assistant", "4", thought="Two and two."),
        Message("user", "And 3+3?"),
        Message("assistant", "6", thought="Three and three."),
    )
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
    Sample("thoughts apart", _APART),
    Sample("tools", _WITH_TOOLS),
    Sample("parallel calls", _PARALLEL),
    Sample("text beside a call", _BESIDE),
    Sample("thoughts and tools", _STEPS),
    Sample("empty system", _talk("Hi", "Hello.", system="")),
    Sample("line breaks first", _talk("Hi", "\nHello.", "And?", "\n\nBye.")),
    Sample("quoted tags", _talk("Which tag?", "Write <think>so</think>, or <tool_call>, and go on.")),
    Sample("special characters", _talk("a\tb\\n \"c\" {{d}} <b>&amp;</b>\n\n```\nx = 'é'\n```", "🙂 naïve – 1\u00a0%")),
    Sample("blanks around", _talk("  two blanks before\n", "two blanks and a line behind  \n")),
    Sample("Chinese", _talk("你好,请介绍一下北京。", "北京是中国的首都。", "谢谢!", "不客气。")),
)


def with_images(first: str, second: str) -> Sample:
    """A conversation about the images in two files."""
    talk = _talk(f"{PLACE}What is this?", "A cat.", f"And is {PLACE} one, too?", "Yes.")
    return Sample("images", replace(talk, media=Media((first, second))))


SHORT = tuple(sample for sample in SAMPLES if sample.name in ("single", "multi-turn, system"))
"""For the check at the start of a run."""
