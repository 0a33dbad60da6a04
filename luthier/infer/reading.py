"""Splits an answer into thought, text and tool calls while it is generated.

Text that may still become a thinking tag or the beginning of a call is held back, so what has been given out is final.
The parts do not depend on the pieces in which the text arrives.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.tools import wrapped
from luthier.data.types import ToolCall
from luthier.model.tokenizer import special_pattern

TAIL_TOKENS = 16
"""At the end of a prompt, to see whether it opens a thought."""


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class Words:
    text: str


Part = Thought | Words | ToolCall


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers of a model are written."""

    thinking_tags: tuple[str, str] | None = None
    """None: answers have no thoughts."""
    call_syntax: str = "default"

    @property
    def thought_marks(self) -> tuple[str, ...]:
        """What opens and closes a thought, without the blanks around it; empty if answers have none."""
        return tuple(tag.strip() for tag in self.thinking_tags or ())

    def hidden(self, special_texts: Collection[str], *, has_tools: bool) -> re.Pattern[str] | None:
        """Matches special tokens, if some of them are tags: these must be read, although the answer is to have none.

        `special_texts`: what `skip_special_tokens` leaves out. None: nothing is lost without it.
        """
        tags = {*self.thought_marks, *(tags_of(self.call_syntax) if has_tools else ())}
        return None if tags.isdisjoint(special_texts) else special_pattern(special_texts)

    def reader(self, end_of_prompt: str, tools: Sequence[Any]) -> "AnswerReader":
        """For one answer. `end_of_prompt`: the last text before it, which may open a thought."""
        is_thinking = opens_thought(end_of_prompt, self.thinking_tags)
        calls = CallReader(self.call_syntax, [wrapped(tool) for tool in tools]) if tools else None
        return AnswerReader(self.thinking_tags, is_thinking=is_thinking, calls=calls)


def opens_thought(end_of_prompt: str, thinking_tags: tuple[str, str] | None) -> bool:
    """Whether a prompt ends inside a thought, so that the answer begins inside it."""
    if thinking_tags is None:
        return False
    opening, closing = (tag.strip() for tag in thinking_tags)
    return end_of_prompt.rfind(opening) > end_of_prompt.rfind(closing)


class AnswerReader:
    """Push pieces of text, then finish once. Both return the parts that are complete.

    `thinking_tags`: around a thought at the beginning of the answer; None if this format has none. `is_thinking`: the
    prompt has opened the thought already. `calls`: reads tool calls; None if there are no tools.
    """

    def __init__(
        self,
        thinking_tags: tuple[str, str] | None = None,
        *,
        is_thinking: bool = False,
        calls: "CallReader | None" = None,
    ) -> None:
        opening, closing = thinking_tags or ("", "")
        self._opening, self._closing = opening.strip(), closing.strip()
        self._calls = calls
        self._state = "thought" if is_thinking else "start" if self._opening else "words"
        self._held = ""
        self._has_thought = self._is_fresh = is_thinking
        """`_is_fresh`: blanks at the beginning of this part are left out."""

    def push(self, text: str) -> list[Part]:
        self._held += text
        return list(self._read(is_last=False))

    def finish(self) -> list[Part]:
        return list(self._read(is_last=True))

    def _read(self, is_last: bool) -> Iterator[Part]:
        if self._state == "start":
            self._begin(is_last)
        if self._state == "thought":
            yield from self._think(is_last)
        if self._state == "words":
            yield from self._speak(is_last)

    def _begin(self, is_last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._opening):
            self._held, self._state, self._is_fresh = begun[len(self._opening) :], "thought", True
        elif begun.startswith(self._closing):  # an empty thought, as GLM 4.7 writes it
            self._held, self._state, self._is_fresh = begun[len(self._closing) :], "words", True
        elif is_last or not any(tag.startswith(begun) for tag in (self._opening, self._closing)):
            self._state = "words"

    def _think(self, is_last: bool) -> Iterator[Part]:
        thought, closing, rest = self._held.partition(self._closing)
        if closing or is_last:
            text, self._held = thought.rstrip(), rest
            if closing:
                self._state = "words"
        else:
            text = _without_partial(thought, self._closing).rstrip()
            self._held = thought[len(text) :]
        text = self._unpadded(text)
        if text:
            yield Thought(text)
        if self._state == "words":
            self._is_fresh = True

    def _speak(self, is_last: bool) -> Iterator[Part]:
        if self._is_fresh:
            self._held = self._held.lstrip()
            self._is_fresh = not self._held
        text, self._held = self._held, ""
        if self._calls is None:
            if text:
                yield Words(text)
            return
        yield from self._calls.push(text)
        if is_last:
            yield from self._calls.finish()

    def _unpadded(self, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        return text


class CallReader:
    """Reads the calls of one syntax out of text. A call that never becomes whole is text.

    Most syntaxes open a call with a tag. In the others (llama3, mistral, glm4) the whole answer is a call, which
    begins with a bracket or the name of a tool.
    """

    def __init__(self, syntax: str, tools: Sequence[Any]) -> None:
        self._parse, self._tools = TOOL_SYNTAXES.get(syntax).parse, tools
        self._opening, self._closing = tags_of(syntax)
        names = [str(tool["function"]["name"]) for tool in tools]
        self._beginnings = ("{", "[", "<|python_tag|>", *(f"{name}\n" for name in names))
        self._held = ""
        self._is_call = False
        self._is_words = False
        """Of a syntax without tags: the answer is no call."""
        self._tried = 0
        """Up to here no call ends."""

    def push(self, text: str) -> Iterator[Part]:
        self._held += text
        if self._opening:
            yield from self._tagged()
        else:
            yield from self._untagged()

    def finish(self) -> Iterator[Part]:
        rest, self._held = self._held, ""
        calls = self._parse(rest, self._tools) if self._is_call else None
        if calls:
            yield from calls
        elif rest:
            yield Words(rest)

    def _tagged(self) -> Iterator[Part]:
        while True:
            if not self._is_call:
                before, opening, _ = self._held.partition(self._opening)
                # Blanks before a call belong to the syntax, unless it turns out to be none.
                text = before.rstrip() if opening else _without_partial(before, self._opening).rstrip()
                self._held = self._held[len(text) :]
                if text:
                    yield Words(text)
                if not opening:
                    return
                self._is_call, self._tried = True, 0
            calls = self._next_calls()
            if not calls:
                return
            yield from calls
            self._is_call = False

    def _next_calls(self) -> list[ToolCall] | None:
        """The calls up to the first closing tag that makes them whole. They are no longer held."""
        while (at := self._held.find(self._closing, self._tried)) >= 0:
            self._tried = at + len(self._closing)
            calls = self._parse(self._held[: self._tried], self._tools)
            if calls:
                self._held = self._held[self._tried :]
                return calls
        return None

    def _untagged(self) -> Iterator[Part]:
        begun = self._held.lstrip()
        if not self._is_words and not self._is_call and begun:
            self._is_call = begun.startswith(self._beginnings)
            self._is_words = not self._is_call and not any(word.startswith(begun) for word in self._beginnings)
        if self._is_words and self._held:
            text, self._held = self._held, ""
            yield Words(text)


def tags_of(syntax: str) -> tuple[str, str]:
    """What opens and closes a call, from a call that the syntax writes; empty texts if the whole answer is a call.

    A syntax that ends with JSON has its closing bracket as the closing tag.
    """
    name = "NAME"
    before, _, after = TOOL_SYNTAXES.get(syntax).write([ToolCall(name, {})]).partition(name)
    opening = re.match(r"\s*(<[^<>]+>|\w+:)", before)
    if opening is None:
        return "", ""
    closing = re.search(r"<[^<>]+>\s*$", after)
    return opening[1], closing[0].strip() if closing else "}"


def _without_partial(text: str, tag: str) -> str:
    """The text without the beginning of a tag at its end."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return text[:-size]
    return text
