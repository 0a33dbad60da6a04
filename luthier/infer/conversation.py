"""One conversation: its messages so far, the prompt for the next answer, and itself as a row of training data."""

import json
from typing import Any

from luthier.core.errors import InvalidInput
from luthier.data.chat.openai_messages import openai_messages
from luthier.data.chat.traits import Traits
from luthier.data.types import Message, ToolCall
from luthier.infer.prompting import Prompting


class Conversation:
    """Alternating questions and answers: call `ask`, then `answered`, or `unanswered` to take the question back."""

    def __init__(self, prompting: Prompting, system: str | None = None, tools: str = "") -> None:
        self.prompting, self.system = prompting, system
        self.tools = read_tools(tools) if tools else ""
        self.history: tuple[Message, ...] = ()

    @property
    def calls(self) -> list[ToolCall]:
        """The tools that the last answer calls."""
        return list(self.history[-1].calls) if self.history else []

    @property
    def awaits_tool_result(self) -> bool:
        """Whether the last answer called a tool, so that the next message is the tool's result."""
        return bool(self.calls)

    def ask(self, text: str) -> list[int]:
        """Add a message; return the prompt ids for its answer."""
        assert len(self.history) % 2 == 0, "the last question has no answer yet"
        question = Message("observation" if self.awaits_tool_result else "user", text)
        prompt_ids = self.prompting.prompt_ids((*self.history, question), self.system, self.tools)
        self.history = (*self.history, question)
        return prompt_ids

    def answered(self, text: str) -> None:
        """Record the answer to the last message."""
        self.history = (*self.history, self.prompting.read_answer(text, self.tools))

    def unanswered(self) -> None:
        """Take back the last message."""
        self.history = self.history[:-1]

    def take_back(self) -> str:
        """Forget the last answer and its question; return the question. Raises `InvalidInput` if there is none."""
        if not self.history:
            raise InvalidInput("there is no answer yet")
        *earlier, question, _ = self.history
        self.history = tuple(earlier)
        return question.content

    def clear(self) -> None:
        """Forget all messages; keep the system text and the tools."""
        self.history = ()

    def as_row(self) -> dict[str, Any]:
        """The conversation as a row of the format `openai`. Raises `InvalidInput` if there is no answer yet."""
        if not self.history:
            raise InvalidInput("there is nothing to save yet")
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*head, *openai_messages(self.history, Traits())]
        return {"messages": messages} | ({"tools": json.loads(self.tools)} if self.tools else {})


def read_tools(text: str) -> str:
    """Check a JSON list of tools, each a function object bare or as `{"type": "function", "function": {...}}`."""
    try:
        tools = json.loads(text)
    except ValueError as fault:
        raise InvalidInput(f"tools: this is not valid JSON ({fault})") from fault
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidInput("tools: this should be a JSON list of function descriptions")
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidInput(f"tools: the function {number} of the list has no name")
    return text
