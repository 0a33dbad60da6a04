"""From messages to prompt ids: with a chat format of luthier, or with the model's own chat template.

With a luthier format the prompt comes from the same `render()` as in training. The model's own chat template is the
Jinja program in its tokenizer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.core.errors import InvalidInput, RowError
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.chat.answers import between
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.render import render
from luthier.data.media.expand import MediaSide
from luthier.data.templates import Piece, Template
from luthier.data.types import Message, ToolCall
from luthier.infer.seen import SeenPrompt, seen_prompt


class Prompting(Protocol):
    """How to write a conversation for the model and read its answers."""

    @property
    def description(self) -> str:
        """A name for messages to the user."""

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        """The ids up to where the answer to the last message begins. `tools` is JSON text or empty.

        Raises `InvalidInput` if the format cannot write the conversation.
        """

    def seen_prompt(
        self, messages: Sequence[Message], system: str | None, tools: str, items: Sequence[str]
    ) -> SeenPrompt:
        """The same for messages with a place for each of `items`, in their order."""

    def read_answer(self, text: str, tools: str) -> Message:
        """An answer as it goes into the history. Calls are parsed only if there are tools; they are rendered as calls
        then."""


@dataclass(frozen=True, slots=True)
class TemplatePrompting:
    template: Template
    encoder: Encoder
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    media: MediaSide | None = None
    """How media are written, if the model takes some."""

    @property
    def description(self) -> str:
        return f"the chat format {self.template.name}"

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        return self.encoder.pieces(self._prompt(messages, system, tools))

    def seen_prompt(
        self, messages: Sequence[Message], system: str | None, tools: str, items: Sequence[str]
    ) -> SeenPrompt:
        return seen_prompt(self._prompt(messages, system, tools), items, self.media, self.encoder)

    def _prompt(self, messages: Sequence[Message], system: str | None, tools: str) -> "tuple[Piece, ...]":
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
        return turn.prompt

    def read_answer(self, text: str, tools: str) -> Message:
        thought = between(self.template.thinking_tags).match(text)
        return with_calls(text, thought.end() if thought else 0, self.template.call_syntax, tools)


@dataclass(frozen=True, slots=True)
class ModelTemplatePrompting:
    """The model's own chat template, run as in training."""

    model_template: ModelChatTemplate
    call_syntax: str
    """The syntax of the model's tool calls. A chat template says how to write calls, not how to parse them."""
    media: MediaSide | None = None
    """How media are written, if the model takes some."""

    @property
    def description(self) -> str:
        return "the model's own chat template"

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        try:
            return self.model_template.prompt_ids(messages, system, tools)
        except RowError as fault:
            raise InvalidInput(f"{fault} -> name another one with `template`") from fault

    def seen_prompt(
        self, messages: Sequence[Message], system: str | None, tools: str, items: Sequence[str]
    ) -> SeenPrompt:
        program = self.model_template
        try:
            text = program.text(messages, system, tools, asks=True, thinks=program.enable_thinking is True)
        except RowError as fault:
            raise InvalidInput(f"{fault} -> name another one with `template`") from fault
        return seen_prompt((text,), items, self.media, program.encoder)

    def read_answer(self, text: str, tools: str) -> Message:
        return with_calls(text, 0, self.call_syntax, tools)


def with_calls(text: str, start: int, syntax: str, tools: str) -> Message:
    """An answer with the calls that are written in it from character `start` on, after its thought."""
    words = text[start:]
    calls = read_calls(syntax, words, tools)
    if not calls:
        return Message("assistant", text)
    beside = before_calls(syntax, words, tools, calls).rstrip("\n")
    return Message("function", text[:start] + beside, calls=tuple(calls))


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
