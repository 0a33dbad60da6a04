"""From messages to prompt ids: with a chat format of luthier, or with the model's own chat template.

With a luthier format the prompt comes from the same `render()` as in training. The model's own chat template is the
Jinja program in its tokenizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.core.errors import InvalidInput, RowError
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.render import render
from luthier.data.templates import Template
from luthier.data.types import Message, ToolCall

ReadAnswer = tuple[Message, list[ToolCall]]
"""An answer as it goes into the history, and its tool calls."""


class Prompting(Protocol):
    """How to write a conversation for the model and read its answers."""

    @property
    def description(self) -> str:
        """A name for messages to the user."""

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        """The ids up to where the answer to the last message begins. `tools` is JSON text or empty.

        Raises `InvalidInput` if the format cannot write the conversation.
        """

    def read_answer(self, text: str, tools: str) -> ReadAnswer:
        """Parses calls only if there are tools. They stay calls in the history, so they are rendered as calls."""


@dataclass(frozen=True, slots=True)
class TemplatePrompting:
    template: Template
    encoder: Encoder
    enable_thinking: bool | None = True
    preserve_thinking: bool = False

    @property
    def description(self) -> str:
        return f"the chat format {self.template.name}"

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        try:
            (turn,) = render(
                self.template,
                tuple(messages),
                system=system,
                tools=tools,
                enable_thinking=self.enable_thinking,
                preserve_thinking=self.preserve_thinking,
                purpose="infer",
            )
        except RowError as fault:
            raise InvalidInput(f"{self.description} cannot write this conversation: {fault}") from fault
        return self.encoder.pieces(turn.prompt)

    def read_answer(self, text: str, tools: str) -> ReadAnswer:
        opening, closing = self.template.thinking_tags
        thought = re.match(f"{re.escape(opening)}.*?{re.escape(closing)}", text, re.DOTALL)
        words = text[thought.end() :] if thought else text
        calls = read_calls(self.template.call_syntax, words, tools)
        if not calls:
            return Message("assistant", text), []
        before_calls, call_word, _ = text.partition(self.template.tool_call_words[0])
        if call_word:  # then the data format can hold text beside the calls
            return Message(
                "function", before_calls + call_word + as_json(calls) + self.template.tool_call_words[1]
            ), calls
        return Message("function", (thought[0] if thought else "") + as_json(calls)), calls


@dataclass(frozen=True, slots=True)
class ModelTemplatePrompting:
    """The model's own chat template, run as in training."""

    model_template: ModelChatTemplate
    call_syntax: str
    """The syntax of the model's tool calls. A chat template says how to write calls, not how to parse them."""

    @property
    def description(self) -> str:
        return "the model's own chat template"

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        try:
            return self.model_template.prompt_ids(messages, system, tools)
        except RowError as fault:
            raise InvalidInput(f"{fault} -> name another one with `template`") from fault

    def read_answer(self, text: str, tools: str) -> ReadAnswer:
        calls = read_calls(self.call_syntax, text, tools)
        if not calls:
            return Message("assistant", text), []
        beside = before_calls(self.call_syntax, text, tools, calls).rstrip("\n")
        return Message("function", beside, calls=tuple(calls)), calls


def before_calls(syntax: str, text: str, tools: str, calls: Sequence[ToolCall]) -> str:
    """The text of an answer before its calls: the longest beginning without which they are still read."""
    least, most = 0, len(text)
    while least < most:
        middle = (least + most + 1) // 2
        if read_calls(syntax, text[middle:], tools) == list(calls):
            least = middle
        else:
            most = middle - 1
    return text[:least]


def read_calls(syntax: str, text: str, tools: str) -> list[ToolCall]:
    """The calls in an answer; none if there are no tools."""
    return (TOOL_SYNTAXES.get(syntax).parse(text, json.loads(tools)) or []) if tools else []


def as_json(calls: Sequence[ToolCall]) -> str:
    return json.dumps([{"name": call.name, "arguments": call.arguments} for call in calls], ensure_ascii=False)
