"""A chat with a loaded model: what `luthier.chat({...})` returns and the terminal uses."""

from collections.abc import Generator
from typing import TYPE_CHECKING

from luthier.infer.conversation import Conversation
from luthier.infer.engines import Generating
from luthier.infer.types import Answer, Settings

if TYPE_CHECKING:
    from luthier.data.types import ToolCall


class ChatSession:
    """Questions and answers with one model; it remembers the conversation until `clear()`."""

    def __init__(self, model: Generating, conversation: Conversation, settings: Settings) -> None:
        self.model, self.conversation, self.settings = model, conversation, settings

    def stream(self, text: str, settings: Settings | None = None) -> Generator[str, None, Answer]:
        """Yields the answer to `text` in pieces. If the caller stops early, the pieces so far become the answer.

        Raises `InvalidInput` if the conversation leaves no room for an answer, or the chat format cannot write it.
        """
        prompt_ids = self.conversation.ask(text)
        written: list[str] = []
        answer = None
        pieces = self.model.stream(prompt_ids, settings or self.settings)
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

    def ask(self, text: str, settings: Settings | None = None) -> str:
        """The whole answer to `text`."""
        return "".join(self.stream(text, settings))

    @property
    def tool_calls(self) -> "list[ToolCall]":
        """The tool calls of the last answer; if there are any, the next question is their result."""
        return self.conversation.calls

    def clear(self) -> None:
        """Begin a new conversation with the same system text and tools."""
        self.conversation.clear()
