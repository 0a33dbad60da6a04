"""A chat with a loaded model: what `luthier.chat({...})` returns and the terminal uses."""

import json
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.infer.conversation import Conversation
from luthier.infer.engines import Generating
from luthier.infer.reading import TAIL_TOKENS, AnswerFormat, AnswerReader, Part
from luthier.infer.types import Answer, Settings

if TYPE_CHECKING:
    from luthier.data.types import ToolCall


class ChatSession:
    """Questions and answers with one model; it remembers the conversation until `clear()`."""

    def __init__(
        self,
        model: Generating,
        conversation: Conversation,
        settings: Settings,
        answers: AnswerFormat | None = None,
        decode: Callable[[list[int]], Any] | None = None,
    ) -> None:
        """`answers`: how the model writes thoughts and calls; without it none are told apart. `decode`: token ids to
        text."""
        self.model, self.conversation, self.settings = model, conversation, settings
        self._answers, self._decode = answers, decode
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
        self._prompt_ids = self.conversation.ask(text, images, videos, audios)
        written: list[str] = []
        answer = None
        pieces = self.model.stream(self._prompt_ids, settings or self.settings)
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
                self.conversation.answered("".join(written))
            else:
                self.conversation.unanswered()

    def stream_parts(self, text: str, settings: Settings | None = None) -> Generator[Part, None, Answer]:
        """The same with thoughts, words and tool calls told apart."""
        pieces = self.stream(text, settings)
        reader: AnswerReader | None = None
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as done:
                    yield from reader.finish() if reader else ()
                    return done.value
                reader = reader or self._reader()
                yield from reader.push(piece)
        finally:
            pieces.close()

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
    def tool_calls(self) -> "list[ToolCall]":
        """The tool calls of the last answer; if there are any, the next question is their result."""
        return self.conversation.calls

    def clear(self) -> None:
        """Begin a new conversation with the same system text and tools."""
        self.conversation.clear()

    def _reader(self) -> AnswerReader:
        if self._answers is None or self._decode is None:
            return AnswerReader()
        tools = json.loads(self.conversation.tools) if self.conversation.tools else []
        return self._answers.reader(str(self._decode(self._prompt_ids[-TAIL_TOKENS:])), tools)
