"""The model's own chat template: Jinja source that renders conversations, in training and at inference.

Every answer is taken as inference sees it. The prompt is the rendering of the messages before it, with the generation
prompt; the answer is the rest of the rendering of the messages up to and including it. The answers of a conversation
share one row as long as each prompt continues the previous answer. Where the template rewrites history (it drops
earlier thoughts, or moves the system text to the last question), a new row begins. An empty thought that only the last
answer has is no reason for one: earlier answers are learned as they stand in the history.

Whatever the data give for an answer is learned. If the template drops a thought, or words that look like one, they are
put back where they belong.

A row is tokenized once, as a whole, and then split into prompts and answers: a token belongs to the part it begins in.
A new row begins, too, where a token would span the border of two parts, since a server tokenizes a prompt by itself.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from luthier.core.errors import RowError, ToolFault
from luthier.data.chat.answers import THINKING_TAGS, has_thought, read_json, split_thought, without_thought
from luthier.data.chat.completeness import require_complete
from luthier.data.chat.continuation import continuation, with_thought, without_frame
from luthier.data.chat.encoder import Encoder, TextWithSpans
from luthier.data.chat.openai_messages import openai_messages, text_and_calls
from luthier.data.chat.parts import around_item, in_parts, places_in, with_marks, with_places
from luthier.data.chat.program import OpenAIMessage, run
from luthier.data.chat.render import Turn
from luthier.data.chat.traits import Traits, traits_of
from luthier.data.tools import wrapped
from luthier.data.types import Dialogue, Message

_MANY_MESSAGES = 16
"""From this number on, it pays to look at each answer among its neighbours."""
_CACHED_CHARS = 2000
"""Longer prompts are rarely repeated."""
_VARIABLE = re.compile("strftime_now|random")
"""In a chat template that may write another text each time."""
_PLACE = "WordsOfTheAnswer"
"""Stands for the text of an answer, to see where the template writes it."""


@dataclass(frozen=True, slots=True)
class RenderedAnswer:
    """An answer as inference sees it: `whole` is `prompt` followed by the answer."""

    prompt: str
    whole: str
    bare: str = ""
    """`whole` without an empty thought that only the last answer has; empty if there is none."""

    @property
    def answer(self) -> str:
        return self.whole[len(self.prompt) :]

    def as_history(self, later: str) -> "RenderedAnswer | None":
        """The answer as it stands in a later prompt; None if that writes it, or the text before it, differently."""
        if later.startswith(self.whole):
            return self
        return RenderedAnswer(self.prompt, self.bare) if self.bare and later.startswith(self.bare) else None


@dataclass(frozen=True, slots=True)
class ModelChatTemplate:
    """Renders with the chat template of the encoder's tokenizer, which must have one."""

    encoder: Encoder
    enable_thinking: bool | None = True
    """None: on for answers with a thought, off for answers without one and for prompts without an answer."""
    preserve_thinking: bool = False
    default_system: str | None = None
    """For conversations that give no system text; if empty, the template's own default."""
    marks: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Name of a kind of media -> what the template writes for an item of it, if conversations may have some."""

    def asked(self, dialogue: Dialogue) -> list[RenderedAnswer]:
        """Every answer of a conversation. Raises `RowError` for one that the template refuses."""
        return [self.asked_at(dialogue, index) for index in range(1, len(dialogue.messages), 2)]

    def rows(self, dialogue: Dialogue, *, only_last: bool = False) -> list[TextWithSpans]:
        """The fewest rows in which each answer follows exactly the prompt that it has at inference.

        `only_last`: only the row with the last answer. The others in it are history, which may be whatever the template
        makes of it.
        """
        at_once = self._at_once(dialogue) if len(dialogue.messages) >= _MANY_MESSAGES else None
        if at_once is not None:
            return [_row(at_once)]
        groups: list[list[RenderedAnswer]] = []
        for answer in self._backwards(dialogue, only_last=only_last):
            as_history = answer.as_history(groups[-1][-1].prompt) if groups else None
            if as_history is not None and not self._merges(as_history, groups[-1][-1]):
                groups[-1].append(as_history)
            elif groups and only_last:
                break
            else:
                groups.append([answer])
        return [_row(group[::-1]) for group in reversed(groups)]

    def asked_at(self, dialogue: Dialogue, index: int) -> RenderedAnswer:
        """The answer that is message `index`. Raises `RowError` if the template refuses it."""
        thinks = self._thinks(dialogue.messages[index])
        prompt = self._prompt(dialogue, index, thinks)
        words = self._answer(dialogue, index, prompt, thinks)
        bare = words.removeprefix(self._traits(dialogue).lead)
        return RenderedAnswer(prompt, prompt + words, prompt + bare if bare != words else "")

    def last_row(self, dialogue: Dialogue) -> TextWithSpans:
        """The last answer alone, with everything before it in its prompt."""
        return _row([self.asked_at(dialogue, len(dialogue.messages) - 1)])

    def last_turn(self, dialogue: Dialogue) -> Turn:
        """Prompt and answer as separate texts, since a server has only the prompt."""
        answer = self.asked_at(dialogue, len(dialogue.messages) - 1)
        return Turn((answer.prompt,), (answer.answer,))

    def prompt_ids(self, messages: Sequence[Message], system: str | None, tools: str) -> list[int]:
        """The ids of a conversation that ends with a question. Raises `RowError` for one that the template refuses."""
        return self.encoder.text(self.text(messages, system, tools, asks=True, thinks=self.enable_thinking is True))

    def text(self, messages: Sequence[Message], system: str | None, tools: str, *, asks: bool, thinks: bool) -> str:
        """The rendered text. `asks`: with the generation prompt, else the last message is an answer to learn. `thinks`:
        the value of `enable_thinking`."""
        listed_tools = openai_tools(tools)
        traits = traits_of(self.encoder.tokenizer, has_tools=listed_tools is not None)
        if system is None:
            system = self.default_system or None
        head = [] if system is None else [{"role": "system", "content": system}]
        written = openai_messages(messages, traits, drops_thoughts=self._drops_thoughts(traits), learns_last=not asks)
        whole = [*head, *written]
        text = run(
            self.encoder.tokenizer,
            self._with_media(whole, traits) if self.marks or traits.wants_parts else whole,
            listed_tools,
            asks=asks,
            switches={
                "preserve_thinking": self.preserve_thinking,
                **dict.fromkeys(("enable_thinking", *traits.switches), thinks),
            },
        )
        if any(str(tool["function"].get("name")) not in text for tool in listed_tools or ()):
            raise RowError("the model's own chat template does not render tools")
        return with_places(text, self._around, places_in(whole)) if self.marks else text

    def around_item(self, name: str) -> tuple[str, str] | None:
        """The texts that the template writes before and after an item of a kind; None if it takes none as parts."""
        tokenizer = self.encoder.tokenizer
        return around_item(tokenizer, str(tokenizer.chat_template), name, self.marks[name])

    @property
    def _around(self) -> dict[str, tuple[str, str, str]]:
        found = {name: self.around_item(name) or ("", "") for name in self.marks}
        return {name: (before, self.marks[name], after) for name, (before, after) in found.items()}

    def _with_media(self, messages: Sequence[OpenAIMessage], traits: Traits) -> list[OpenAIMessage]:
        """The messages with their media as the template reads them: as parts, or as marks in the text."""
        if traits.wants_parts or any(self.around_item(name) is not None for name in self.marks):
            return in_parts(messages, all_contents=traits.wants_parts)
        return [
            {**message, "content": with_marks(message["content"], self.marks)}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]

    def _backwards(self, dialogue: Dialogue, *, only_last: bool) -> Iterator[RenderedAnswer]:
        """The answers, the last one first. `only_last`: it ends before an earlier one that the template refuses."""
        last = len(dialogue.messages) - 1
        for index in range(last, 0, -2):
            try:
                yield self.asked_at(dialogue, index)
            except RowError:
                if only_last and index != last:
                    return
                raise

    def _at_once(self, dialogue: Dialogue) -> list[RenderedAnswer] | None:
        """The answers of a conversation that is one row; None if it is not.

        To render every prompt takes time that grows with the square of their number. So the prompt of the last answer
        is put together from the text of each answer and of the question after it, as they are among their neighbours.
        It must be what the template writes, and so must a few earlier prompts.
        """
        messages = dialogue.messages
        answers: list[RenderedAnswer] = []
        try:
            last = self.asked_at(dialogue, len(messages) - 1)
            text = self._prompt(dialogue, 1, self._thinks(messages[1]))
            for index in range(1, len(messages) - 1, 2):
                # A result of a tool follows its call, and the first message is a question of the user.
                near = messages[:3] if index == 1 else (messages[0], *messages[index - 2 : index + 2])
                asked = self.asked_at(replace(dialogue, messages=near[:-1]), len(near) - 2)
                later = self._prompt(replace(dialogue, messages=near), len(near), self._thinks(messages[index + 2]))
                kept = asked.as_history(later)
                if kept is None or self._merges(kept, RenderedAnswer(later, later)):
                    return None
                answers.append(RenderedAnswer(text, text + kept.answer))
                text += later[len(kept.prompt) :]
            samples = (len(answers) // 3, 2 * len(answers) // 3, len(answers) - 1)
            prompts = {n: self._prompt(dialogue, 2 * n + 1, self._thinks(messages[2 * n + 1])) for n in samples}
        except RowError:  # answer by answer, it is found which one cannot be written
            return None
        is_one = text == last.prompt and all(answers[n].prompt == prompt for n, prompt in prompts.items())
        return [*answers, last] if is_one else None

    def _thinks(self, answer: Message) -> bool:
        if self.enable_thinking is not None:
            return self.enable_thinking
        return bool(answer.thought) or has_thought(text_and_calls(answer)[0])

    def _prompt(self, dialogue: Dialogue, end: int, thinks: bool) -> str:
        """Of the answer after the first `end` messages."""
        given = dialogue.messages[:end], dialogue.system, dialogue.tools
        source = str(self.encoder.tokenizer.chat_template)
        size = sum(len(message.content) for message in given[0])
        if size > _CACHED_CHARS or any(message.calls for message in given[0]) or _VARIABLE.search(source):
            return self.text(*given, asks=True, thinks=thinks)
        return _known_prompt(self, source, *given, thinks)

    def _merges(self, answer: RenderedAnswer, following: RenderedAnswer) -> bool:
        """Whether a token of the row spans the border between the answer and the text before or after it."""
        prompt, words = answer.prompt, answer.answer
        after = following.prompt[len(answer.whole) :]
        return self.encoder.straddles(prompt, words) or self.encoder.straddles(answer.whole, after)

    def _traits(self, dialogue: Dialogue) -> Traits:
        return traits_of(self.encoder.tokenizer, has_tools=openai_tools(dialogue.tools) is not None)

    def _drops_thoughts(self, traits: Traits) -> bool:
        return self.enable_thinking is False and traits.knows_thoughts

    def _answer(self, dialogue: Dialogue, index: int, prompt: str, thinks: bool) -> str:
        """The text after the prompt, with all that the data give to be learned. Raises `RowError`."""
        message = dialogue.messages[index]
        traits = self._traits(dialogue)
        drops = self._drops_thoughts(traits)
        words = self._continued(dialogue, index, message, prompt, thinks)
        loss = _loss(message, without_frame(prompt, words, traits.end), drops)
        if loss is None:
            return words
        for place in (self._with_inline_thought, self._put_in_place):
            try:
                words = place(dialogue, index, prompt, thinks, drops)
            except RowError:
                continue
            if _loss(message, without_frame(prompt, words, traits.end), drops) is None:
                return words
        raise loss

    def _continued(self, dialogue: Dialogue, index: int, message: Message, prompt: str, thinks: bool) -> str:
        """The text after the prompt, with `message` at `index`."""
        before = dialogue.messages[:index]
        whole = self.text((*before, message), dialogue.system, dialogue.tools, asks=False, thinks=thinks)
        asked = before[-1].results[-1].content if before[-1].results else before[-1].content
        return continuation(prompt, whole, asked)

    def _with_inline_thought(self, dialogue: Dialogue, index: int, prompt: str, thinks: bool, drops: bool) -> str:
        """The answer with its thought in the text, for a template that reads it there only."""
        message = dialogue.messages[index]
        if drops or not message.thought:
            raise RowError("there is no thought to write into the text")
        opening, closing = THINKING_TAGS
        text, calls = text_and_calls(message)
        content = f"{opening}\n{message.thought.strip()}\n{closing}\n\n{text}"
        written = replace(message, content=content, thought="", calls=tuple(calls))
        return self._continued(dialogue, index, written, prompt, thinks)

    def _put_in_place(self, dialogue: Dialogue, index: int, prompt: str, thinks: bool, drops: bool) -> str:
        """The answer with its words where the template writes an answer, and its thought where it writes thoughts."""
        message = dialogue.messages[index]
        text, calls = text_and_calls(message)
        thought, inline = ("" if drops else message.thought.strip()), ""
        if drops:
            text = without_thought(text)
        elif not thought:
            thought, inline, text = _inline_thought(text)
        place = _PLACE if text.strip() else ""
        framed = replace(message, content=place, thought=thought, calls=tuple(calls))
        words = self._continued(dialogue, index, framed, prompt, thinks)
        before, found, after = words.partition(place) if place else (words, "", "")
        if found != place:
            raise RowError("the model's own chat template does not render the text of the answer")
        if thought and thought not in without_frame(prompt, before, ""):
            before = with_thought(prompt, before, thought, inline)
        return before + text * bool(place) + after


@lru_cache(maxsize=256)
def _known_prompt(
    own: ModelChatTemplate,
    source: str,
    messages: tuple[Message, ...],
    system: str | None,
    tools: str,
    thinks: bool,
) -> str:
    """Cached, since many rows with media ask the same: to transcribe, to describe, to choose a class.

    `source`: of the chat template; part of the key, since a tokenizer may get another one.
    """
    return own.text(messages, system, tools, asks=True, thinks=thinks)


def _inline_thought(text: str) -> tuple[str, str, str]:
    """(thought, the same with its tags as the text writes it, the text after it) of an answer that begins with one.

    The opening tag may be missing, since prompts may open the thought.
    """
    opening = THINKING_TAGS[0]
    is_open = has_thought(text) and not text.lstrip().startswith(opening)
    thought, rest = split_thought(opening + text if is_open else text)
    if thought is None:
        return "", "", text
    return thought, text.removesuffix(rest) if rest else text, rest


def _loss(message: Message, words: str, drops_thoughts: bool) -> RowError | None:
    """What of the answer is missing in the text that is learned; None if it is complete."""
    try:
        require_complete(message, words, thoughts_dropped=drops_thoughts)
    except RowError as fault:
        thought, inline, rest = _inline_thought(message.content)
        is_open = bool(thought) and not inline.lstrip().startswith(THINKING_TAGS[0])
        if drops_thoughts or message.role == "function" or message.thought or not is_open:
            return fault
        return _loss(replace(message, content=rest, thought=thought), words, drops_thoughts)
    return None


def _row(group: Iterable[RenderedAnswer]) -> TextWithSpans:
    group = list(group)
    borders = (border for answer in group for border in (len(answer.prompt), len(answer.whole)))
    return TextWithSpans(group[-1].whole, tuple(borders))


def openai_tools(tools: str) -> list[Any] | None:
    """The tools in the form of OpenAI's API; None if there are none. Raises `ToolFault`."""
    if not tools:
        return None
    try:
        listed = read_json(tools)
    except ValueError as error:
        raise ToolFault(f"the tools are not JSON: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise ToolFault("the tools are not a list of objects")
    try:
        return [dict(wrapped(tool)) for tool in listed] or None
    except KeyError as error:
        raise ToolFault("a tool of type function holds no function") from error
