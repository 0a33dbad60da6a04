"""From messages to prompt ids, in one of two ways: a chat format of luthier, or the model's own chat template.

With a luthier template the prompt comes from the same `render()` as in training. The model's own template is what it
was shipped with, a Jinja program in its tokenizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from luthier.core.errors import InvalidInput, RowError
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.encode import Encoder
from luthier.data.render import render
from luthier.data.templates import Template
from luthier.data.tools import ToolCall
from luthier.data.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ReadAnswer = tuple[Message, list[ToolCall]]
"""An answer as it goes into the history, and the tools that it calls."""


class Prompting(Protocol):
    """How a conversation is written for the model, and how its answers are read."""

    @property
    def description(self) -> str:
        """Which way this is, for the user."""

    def prompt_ids(self, messages: Sequence[Message], system: str, tools: str) -> list[int]:
        """The ids up to where the answer begins; the last message waits for it. `tools` is JSON text or empty.

        Raises `InvalidInput` for a conversation that cannot be written.
        """

    def read_answer(self, text: str, tools: str) -> ReadAnswer:
        """Calls are looked for only if there are tools. They are kept as calls, so that they are rendered as such."""


@dataclass(frozen=True, slots=True)
class TemplatePrompting:
    template: Template
    encoder: Encoder
    enable_thinking: bool | None = True
    preserve_thinking: bool = False

    @property
    def description(self) -> str:
        return f"the chat format {self.template.name}"

    def prompt_ids(self, messages: Sequence[Message], system: str, tools: str) -> list[int]:
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
        opening, closing = self.template.thought_words
        thought = re.match(f"{re.escape(opening)}.*?{re.escape(closing)}", text, re.DOTALL)
        words = text[thought.end() :] if thought else text
        calls = read_calls(self.template.call_syntax, words, tools)
        if not calls:
            return Message("assistant", text), []
        before_calls, call_word, _ = text.partition(self.template.tool_call_words[0])
        if call_word:  # then the data format has a place for words beside the calls
            return Message(
                "function", before_calls + call_word + as_json(calls) + self.template.tool_call_words[1]
            ), calls
        return Message("function", (thought[0] if thought else "") + as_json(calls)), calls


@dataclass(frozen=True, slots=True)
class OwnTemplatePrompting:
    """The tokenizer's own chat template."""

    tokenizer: "PreTrainedTokenizerBase"
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    default_system: str = ""
    tool_format: str | None = None
    """The syntax in which the model calls tools. A chat template says how calls are written, not how they are read."""

    @property
    def description(self) -> str:
        return "the model's own chat template"

    def prompt_ids(self, messages: Sequence[Message], system: str, tools: str) -> list[int]:
        from jinja2 import TemplateError

        system = system or self.default_system
        head = [{"role": "system", "content": system}] if system else []
        try:
            text = self.tokenizer.apply_chat_template(
                [*head, *map(_as_openai, messages)],
                tools=json.loads(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=self.enable_thinking is True,
                preserve_thinking=self.preserve_thinking,
            )
        except TemplateError as fault:
            raise InvalidInput(
                f"{self.description} cannot write this conversation ({fault}); name another one with `template`"
            ) from fault
        return self.tokenizer.encode(text, add_special_tokens=False)

    def read_answer(self, text: str, tools: str) -> ReadAnswer:
        calls = read_calls(self.tool_format, text, tools) if self.tool_format else []
        return (Message("function", as_json(calls)), calls) if calls else (Message("assistant", text), [])


def answer_end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special token that the tokenizer's own chat template puts behind an answer; none if it puts none there.

    It is the eos token of most tokenizers, but not of those that a base model shares with its chat model.
    """
    mark = "⟪answer⟫"
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    _, _, behind = str(tokenizer.apply_chat_template(talk, tokenize=False)).rpartition(mark)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [index for index in tokenizer.encode(behind, add_special_tokens=False) if index in special][:1]


def read_calls(syntax: str, text: str, tools: str) -> list[ToolCall]:
    """The calls in an answer; none if there are no tools to call."""
    return (TOOL_SYNTAXES.get(syntax).parse(text, json.loads(tools)) or []) if tools else []


def as_json(calls: Sequence[ToolCall]) -> str:
    return json.dumps([{"name": call.name, "arguments": call.arguments} for call in calls], ensure_ascii=False)


def _as_openai(message: Message) -> dict[str, Any]:
    if message.role == "function":
        calls = [{"type": "function", "function": call} for call in json.loads(message.content)]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": "tool" if message.role == "observation" else message.role, "content": message.content}
