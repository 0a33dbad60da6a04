"""The model's own chat template: Jinja source that renders conversations, in training and at inference.

Every answer is taken as inference sees it. The prompt is the rendering of the messages before it, with the generation
prompt; the answer is the rest of the rendering of the messages up to and including it. The answers of a conversation
share one row as long as each prompt continues the previous answer. Where the template rewrites history (it drops
earlier thoughts, or adds an empty one to the last answer only), a new row begins.

A row is tokenized once, as a whole, and then split into prompts and answers: a token belongs to the part it begins in.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import RowError, ToolFault
from luthier.data.chat.answers import THINKING_TAGS, has_thought, take_apart, without_thought
from luthier.data.chat.continuation import continuation
from luthier.data.chat.encoder import Encoder, TextWithSpans
from luthier.data.chat.render import Turn
from luthier.data.tools import wrapped
from luthier.data.types import Dialogue, Message

_COMPARED_CHARACTERS = 20
"""The end of an answer that must appear in its rendering."""
_QUOTED = re.compile(r"\b\d+\b|'[^']*'|\"[^\"]*\"|`[^`]*`")
"""What the message of a template may quote from a row."""


@dataclass(frozen=True, slots=True)
class RenderedAnswer:
    """An answer as inference sees it: `whole` is `prompt` followed by the answer."""

    prompt: str
    whole: str

    @property
    def answer(self) -> str:
        return self.whole[len(self.prompt) :]


@dataclass(frozen=True, slots=True)
class ModelChatTemplate:
    """Renders with the chat template of the encoder's tokenizer, which must have one."""

    encoder: Encoder
    enable_thinking: bool | None = True
    """None: on for answers with a thought, off for answers without one and for prompts without an answer."""
    preserve_thinking: bool = False
    default_system: str | None = None
    """For conversations without a system text; if empty, the template's own default."""

    def asked(self, dialogue: Dialogue) -> list[RenderedAnswer]:
        """Every answer of a conversation. Raises `RowError` for one that the template refuses."""
        return [self._asked(dialogue, index) for index in range(1, len(dialogue.messages), 2)]

    def rows(self, dialogue: Dialogue) -> list[TextWithSpans]:
        """The fewest rows in which each answer follows exactly the prompt that it has at inference."""
        groups: list[list[RenderedAnswer]] = []
        for answer in self.asked(dialogue):
            if groups and answer.prompt.startswith(groups[-1][-1].whole):
                groups[-1].append(answer)
            else:
                groups.append([answer])
        return [_row(group) for group in groups]

    def asked_at(self, dialogue: Dialogue, index: int) -> RenderedAnswer:
        """The answer that is message `index`."""
        return self._asked(dialogue, index)

    def last_row(self, dialogue: Dialogue) -> TextWithSpans:
        """The last answer alone, with everything before it in its prompt."""
        return _row([self._asked(dialogue, len(dialogue.messages) - 1)])

    def last_turn(self, dialogue: Dialogue) -> Turn:
        """Prompt and answer as separate texts, since a server has only the prompt."""
        answer = self._asked(dialogue, len(dialogue.messages) - 1)
        return Turn((answer.prompt,), (answer.answer,))

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        """The ids of a conversation that ends with a question. Raises `RowError` for one that the template refuses."""
        return self.encoder.text(self.text(messages, system, tools, asks=True, thinks=self.enable_thinking is True))

    def text(self, messages: Sequence[Message], system: str | None, tools: str, *, asks: bool, thinks: bool) -> str:
        """The rendered text. `asks`: with the generation prompt. `thinks`: the value of `enable_thinking`."""
        from jinja2 import TemplateError

        system = system or self.default_system
        head = [{"role": "system", "content": system}] if system else []
        listed_tools = openai_tools(tools)
        written = self._openai_messages(messages)
        try:
            text = str(
                self.encoder.tokenizer.apply_chat_template(
                    [*head, *written],
                    tools=listed_tools,
                    add_generation_prompt=asks,
                    tokenize=False,
                    enable_thinking=thinks,
                    preserve_thinking=self.preserve_thinking,
                )
            )
        except (TemplateError, TypeError, ValueError) as fault:
            quoted = _QUOTED.findall(str(fault))
            raise RowError(f"the model's own chat template refuses the conversation: {fault}", *quoted) from fault
        if any(str(tool["function"].get("name")) not in text for tool in listed_tools or ()):
            raise RowError("the model's own chat template does not render tools")
        return text

    def _asked(self, dialogue: Dialogue, index: int) -> RenderedAnswer:
        """The answer that is message `index`."""
        messages, content = dialogue.messages, dialogue.messages[index].content
        thinks = has_thought(content) if self.enable_thinking is None else self.enable_thinking
        prompt = self.text(messages[:index], dialogue.system, dialogue.tools, asks=True, thinks=thinks)
        whole = self.text(messages[: index + 1], dialogue.system, dialogue.tools, asks=False, thinks=thinks)
        asked = RenderedAnswer(prompt, prompt + continuation(prompt, whole, messages[index - 1].content, content))
        given = take_apart(messages[index])
        if any(call.name not in asked.answer for call in given.calls):
            raise RowError("the model's own chat template does not render tool calls")
        # Only the end is compared, since thoughts may be dropped. Some templates for images do not render plain text.
        if given.text.rpartition(THINKING_TAGS[1])[2].strip()[-_COMPARED_CHARACTERS:] not in asked.answer:
            raise RowError("the model's own chat template does not render the text of the answer")
        return asked

    def _openai_messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """As a client of OpenAI's API sends them, with call ids of the form that Mistral requires."""
        listed: list[dict[str, Any]] = []
        call_ids: list[str] = []
        drops_thoughts = self.enable_thinking is False and "think" in str(self.encoder.tokenizer.chat_template)
        for index, message in enumerate(messages):
            if message.role == "user":
                listed.append({"role": "user", "content": message.content})
            elif message.role == "observation":
                answered = {"tool_call_id": call_ids[0]} if call_ids else {}
                listed.append({"role": "tool", "content": message.content, **answered})
            else:
                answer = take_apart(message)
                text = without_thought(answer.text) if drops_thoughts else answer.text
                listed.append({"role": "assistant", "content": text})
                call_ids = [f"call{index:03d}{number:02d}" for number in range(len(answer.calls))]
                if answer.calls:
                    listed[-1]["tool_calls"] = [
                        {"id": i, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                        for i, call in zip(call_ids, answer.calls, strict=True)
                    ]
        return listed


def _row(group: list[RenderedAnswer]) -> TextWithSpans:
    borders = (border for answer in group for border in (len(answer.prompt), len(answer.whole)))
    return TextWithSpans(group[-1].whole, tuple(borders))


def openai_tools(tools: str) -> list[Any] | None:
    """The tools in the form of OpenAI's API; None if there are none. Raises `ToolFault`."""
    if not tools:
        return None
    try:
        listed = json.loads(tools)
    except ValueError as error:
        raise ToolFault(f"the tools are not JSON: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise ToolFault("the tools are not a list of objects")
    whole = [dict(wrapped(tool)) for tool in listed]
    if not all(isinstance(tool.get("function"), dict) for tool in whole):
        raise ToolFault("a tool of type function holds no function")
    return whole or None
