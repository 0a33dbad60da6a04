"""A chat with a loaded model: what `luthier.chat({...})` returns and the terminal uses."""

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from luthier.data.types import ToolCall
from luthier.infer.conversation import Conversation
from luthier.infer.engines import Generating
from luthier.infer.reading import TAIL_TOKENS, AnswerFormat, AnswerReader, Part, Thought, Words
from luthier.infer.types import Answer, Settings
from luthier.model.tokenizer import special_pattern


class ChatSession:
    """Questions and answers with one model; it remembers the conversation until `clear()`."""

    def __init__(
        self,
        model: Generating,
        conversation: Conversation,
        settings: Settings,
        answers: AnswerFormat | None = None,
        decode: Callable[[list[int]], Any] | None = None,
        special_texts: frozenset[str] = frozenset(),
    ) -> None:
        """`answers`: how the model writes thoughts and calls; without it none are told apart. `decode`: token ids to
        text. `special_texts`: those of the special tokens."""
        self.model, self.conversation, self.settings = model, conversation, settings
        self._answers, self._decode, self._special_texts = answers, decode, special_texts
        self._prompt_ids: list[int] = []

    def stream(
        self,
        text: str,
        settings: Settings | None = None,
        images: Sequence[str] = (),
        videos: Sequence[str | Sequence[str]] = (),
        audios: Sequence[str] = (),
    ) -> Generator[str, None, Answer]:
        """Yields the answer to `text` in pieces. If the caller stops early, the pieces so far become the answer.

        `images`, `videos`, `audios`: paths of files that stand before the text; a video may be a list of the paths of
        its frames.

        Raises `InvalidInput` if the conversation leaves no room for an answer, or the chat format cannot write it.
        """
        settings = settings or self.settings
        hidden = self._hidden(settings)
        pieces = self._pieces(text, settings, hidden, images, videos, audios)
        try:
            while True:
                shown = _without(hidden, next(pieces))
                if shown:
                    yield shown
        except StopIteration as done:
            return replace(done.value, text=_without(hidden, done.value.text))
        finally:
            pieces.close()

    def stream_parts(self, text: str, settings: Settings | None = None) -> Generator[Part, None, Answer]:
        """The same with thoughts, words and tool calls told apart."""
        settings = settings or self.settings
        hidden = self._hidden(settings)
        pieces = self._pieces(text, settings, hidden)
        reader: AnswerReader | None = None
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as done:
                    yield from _shown(reader.finish() if reader else (), hidden)
                    return replace(done.value, text=_without(hidden, done.value.text))
                reader = reader or self._reader()
                yield from _shown(reader.push(piece), hidden)
        finally:
            pieces.close()

    def _pieces(
        self,
        text: str,
        settings: Settings,
        hidden: re.Pattern[str] | None,
        images: Sequence[str] = (),
        videos: Sequence[str | Sequence[str]] = (),
        audios: Sequence[str] = (),
    ) -> Generator[str, None, Answer]:
        """Yields the answer with the special tokens that `hidden` matches, and records it."""
        self._prompt_ids = self.conversation.ask(text, images, videos, audios)
        written: list[str] = []
        answer = None
        if hidden is not None:
            settings = replace(settings, skip_special_tokens=False)
        pieces = self.model.stream(self._prompt_ids, settings)
        try:
            while True:
                piece = next(pieces)
                written.append(piece)
                yield piece
        except StopIteration as done:
            answer = done.value
            return done.value
        finally:
            pieces.close()
            if written or answer is not None:
                self.conversation.answered("".join(written), None if hidden is None else self._forgotten)
            else:
                self.conversation.unanswered()

    def ask(
        self,
        text: str,
        settings: Settings | None = None,
        images: Sequence[str] = (),
        videos: Sequence[str | Sequence[str]] = (),
        audios: Sequence[str] = (),
    ) -> str:
        """The whole answer to `text`. `images`, `videos`, `audios`: paths of files that stand before it; a video may be
        a list of the paths of its frames."""
        return "".join(self.stream(text, settings, images, videos, audios))

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The tool calls of the last answer; if there are any, the next question is their result."""
        return self.conversation.calls

    def clear(self) -> None:
        """Begin a new conversation with the same system text and tools."""
        self.conversation.clear()

    def _hidden(self, settings: Settings) -> re.Pattern[str] | None:
        """Matches special tokens, if some of them must be read although the answer is to have none."""
        if self._answers is None or not settings.skip_special_tokens:
            return None
        return self._answers.hidden(self._special_texts, has_tools=bool(self.conversation.tools))

    @cached_property
    def _forgotten(self) -> re.Pattern[str]:
        """Matches the special tokens that an answer of the history is without: it keeps the tags of its thought, since
        the chat format leaves out thoughts of the past."""
        assert self._answers is not None
        return special_pattern(self._special_texts.difference(self._answers.thought_marks))

    def _reader(self) -> AnswerReader:
        if self._answers is None or self._decode is None:
            return AnswerReader()
        tools = json.loads(self.conversation.tools) if self.conversation.tools else []
        return self._answers.reader(str(self._decode(self._prompt_ids[-TAIL_TOKENS:])), tools)


def _without(hidden: re.Pattern[str] | None, text: str) -> str:
    return text if hidden is None else hidden.sub("", text)


def _shown(parts: Sequence[Part], hidden: re.Pattern[str] | None) -> Iterator[Part]:
    """The parts without special tokens, and without a part that has nothing else."""
    for part in parts:
        match part:
            case ToolCall():
                yield part
            case Thought(text) | Words(text) if shown := _without(hidden, text):
                yield type(part)(shown)
