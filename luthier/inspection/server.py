"""What an inference server makes of a conversation: `apply_chat_template` on the messages of its client.

Nothing here is shared with the code that makes the rows of training, except for reading the data and for what the user
of a server has to know: the names of the template's switches. So a fault of that code cannot be on both sides.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.chat.answers import has_thought, split_thought, take_apart
from luthier.data.chat.model_template import openai_tools
from luthier.data.chat.parts import around_item, in_parts, with_marks
from luthier.data.chat.program import run, source
from luthier.data.chat.traits import THOUGHT_KEYS, Traits, traits_of
from luthier.data.media.kinds import arguments_for, load
from luthier.data.types import Dialogue, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.media.blocks import MediaProcessor


@dataclass(frozen=True, slots=True)
class Served:
    """An answer at a server."""

    prompt: str
    """What the model is given."""
    whole: str | None
    """The prompt and the answer, as the template writes them once the answer is in the history; None if it cannot."""

    @property
    def is_continued(self) -> bool:
        """Whether the prompt is written in the same way then."""
        return self.whole is not None and self.whole.startswith(self.prompt)

    @property
    def text(self) -> str:
        """What the template writes of the answer, with the prompt before it unless it continues that."""
        return (self.whole or "").removeprefix(self.prompt)


@dataclass(frozen=True, slots=True)
class Server:
    tokenizer: "PreTrainedTokenizerBase"
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    default_system: str | None = None
    media: "MediaProcessor | None" = None
    """The processor of a model that sees."""
    items: tuple[str, ...] = ()
    """Those of the conversation: a client sends them with it."""

    def asked(self, dialogue: Dialogue) -> list[Served]:
        """Every answer of a conversation. Raises `RowError` for one that the template refuses."""
        return [self._asked(dialogue, index) for index in range(1, len(dialogue.messages), 2)]

    def ids(self, text: str) -> list[int]:
        """The token ids of a rendered text; of one with media, those that the processor gives for both."""
        num_items = sum(map(text.count, self.media.marks.values())) if self.media is not None else 0
        if self.media is not None and num_items:
            loaded = [load(item, self.media.processor) for item in self.items[:num_items]]
            given = arguments_for([loaded], self.media.processor)
            return list(self.media.processor(text=[text], **given)["input_ids"][0])
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, dialogue: Dialogue, end: int, *, asks: bool, thinks: bool) -> str:
        """The rendering of the first `end` messages. Raises `RowError`."""
        tools = openai_tools(dialogue.tools)
        traits = traits_of(self.tokenizer, has_tools=tools is not None)
        switches = dict.fromkeys(("enable_thinking", *traits.switches), thinks)
        switches |= {"preserve_thinking": self.preserve_thinking}
        template = source(self.tokenizer, has_tools=tools is not None)
        messages = dialogue.messages[:end]
        head = self._system(dialogue)
        objects = [*head, *_messages(messages, template, self.enable_thinking is False, arguments_as_text=False)]
        refusal = None
        try:
            text = run(self.tokenizer, self._sent(objects, traits), tools, asks=asks, switches=switches)
        except RowError as error:
            refusal, text = error, ""
        if refusal or any(str(call.arguments) in text for call in _calls(messages) if call.arguments):
            texts = [*head, *_messages(messages, template, self.enable_thinking is False, arguments_as_text=True)]
            if texts == objects and refusal:
                raise refusal
            text = run(self.tokenizer, self._sent(texts, traits), tools, asks=asks, switches=switches)
        if any(str(tool["function"].get("name")) not in text for tool in tools or ()):
            raise RowError("the model's own chat template does not render tools")
        return text

    def _sent(self, messages: list[dict[str, Any]], traits: Traits) -> list[dict[str, Any]]:
        """The messages with their media: as parts where the template reads these, else as marks in the text."""
        marks = {} if self.media is None else self.media.marks
        program = str(self.tokenizer.chat_template)
        takes = (around_item(self.tokenizer, program, name, mark) is not None for name, mark in marks.items())
        if traits.wants_parts or any(takes):
            return in_parts(messages, all_contents=traits.wants_parts)
        if not marks:
            return messages
        return [{**message, "content": with_marks(str(message["content"]), marks)} for message in messages]

    def _system(self, dialogue: Dialogue) -> list[dict[str, Any]]:
        system = self.default_system or None if dialogue.system is None else dialogue.system
        return [] if system is None else [{"role": "system", "content": system}]

    def _asked(self, dialogue: Dialogue, index: int) -> Served:
        answer = dialogue.messages[index]
        thinks = self.enable_thinking
        if thinks is None:
            thinks = bool(answer.thought) or has_thought(answer.content)
        prompt = self.text(dialogue, index, asks=True, thinks=thinks)
        try:
            return Served(prompt, self.text(dialogue, index + 1, asks=False, thinks=thinks))
        except RowError:
            return Served(prompt, None)


def _calls(messages: Sequence[Message]) -> Iterator[Any]:
    return (call for message in messages if message.role == "function" for call in take_apart(message).calls)


def _messages(
    messages: Sequence[Message], template: str, drops_thoughts: bool, *, arguments_as_text: bool
) -> Iterator[dict[str, Any]]:
    """The messages in the shape of OpenAI's API."""
    own_key = next((key for key in THOUGHT_KEYS if key in template), None)
    for message in messages:
        if message.role == "user":
            yield {"role": "user", "content": message.content}
        elif message.role == "observation" and not message.results:
            yield {"role": "tool", "content": message.content}
        elif message.role == "observation":
            for result in message.results:
                optional = {"tool_call_id": result.call_id, "name": result.name}
                yield {"role": "tool", "content": result.content, **{k: v for k, v in optional.items() if v}}
        else:
            answer = take_apart(message)
            thought, text = message.thought, answer.text if message.calls or not answer.calls else answer.text.strip()
            if own_key and not thought and "</think>" not in template:
                inline, rest = split_thought(text)
                thought, text = (inline, rest) if inline else ("", text)
            if drops_thoughts and (own_key or "think" in template):
                thought, text = "", split_thought(text)[1]
            said: dict[str, Any] = {"role": "assistant", "content": text}
            if thought:  # servers that name the key differently accept the other names too
                said |= {"reasoning_content": thought, "reasoning": thought}
            if answer.calls:
                said["tool_calls"] = [
                    {
                        **({"id": call.id} if call.id else {}),
                        "type": "function",
                        "function": {
                            "name": call.name,
                            "arguments": json.dumps(call.arguments, ensure_ascii=False)
                            if arguments_as_text
                            else call.arguments,
                        },
                    }
                    for call in answer.calls
                ]
            yield said
