"""One conversation: its messages so far, the prompt for the next answer, and itself as a row of training data."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.core.errors import InvalidInput, RowError
from luthier.data.chat.answers import read_json
from luthier.data.chat.openai_messages import openai_messages
from luthier.data.chat.parts import has_place, num_places, without_places
from luthier.data.chat.traits import Traits
from luthier.data.media.items import with_tags
from luthier.data.media.kinds import MediaKind, by_column, kind_of, media_kind
from luthier.data.types import Message, ToolCall
from luthier.infer.prompting import Prompting


class Conversation:
    """Alternating questions and answers: call `ask`, then `answered`, or `unanswered` to take the question back."""

    def __init__(self, prompting: Prompting, system: str | None = None, tools: str = "") -> None:
        self.prompting, self.system = prompting, system
        self.tools = read_tools(tools) if tools else ""
        self.history: tuple[Message, ...] = ()
        self.items: tuple[str, ...] = ()
        """Images, videos and audio of all messages, in the order of their places."""
        self.shown: tuple[str, ...] = ()
        """Those that the next question will have, besides its own."""

    @property
    def calls(self) -> list[ToolCall]:
        """The tools that the last answer calls."""
        return list(self.history[-1].calls) if self.history else []

    @property
    def awaits_tool_result(self) -> bool:
        """Whether the last answer called a tool, so that the next message is the tool's result."""
        return bool(self.calls)

    def show(self, path: str, kind: str = "image") -> None:
        """Put an item before the next question. Raises `InvalidInput` if it cannot be read."""
        self.shown = (*self.shown, _readable(path, media_kind(kind)))

    def ask(
        self,
        text: str,
        images: Sequence[str] = (),
        videos: Sequence[str | Sequence[str]] = (),
        audios: Sequence[str] = (),
    ) -> list[int]:
        """Add a message with the items that were shown, and with those that are given as paths, before its text; return
        the prompt ids for its answer. A video may be a list of the paths of its frames."""
        assert len(self.history) % 2 == 0, "the last question has no answer yet"
        if not all(map(_is_utf8, (text, self.system or ""))):
            raise InvalidInput("the text holds bytes that are not UTF-8, or half of a surrogate pair")
        if has_place(text):
            raise InvalidInput("the text holds a character that Unicode keeps for programs (U+FDD0 to U+FDD4)")
        given: dict[str, Sequence[str | Sequence[str]]] = {"image": images, "video": videos, "audio": audios}
        more = (*self.shown, *(_readable(path, media_kind(name)) for name, paths in given.items() for path in paths))
        places = "".join(kind_of(item).place for item in more)
        question = Message("observation" if self.awaits_tool_result else "user", places + text)
        messages, seen = (*self.history, question), (*self.items, *more)
        if seen:
            prompt_ids: list[int] = self.prompting.seen_prompt(messages, self.system, self.tools, seen)
        else:
            prompt_ids = self.prompting.prompt_ids(messages, self.system, self.tools)
        self.history, self.items, self.shown = messages, seen, ()
        return prompt_ids

    def answered(self, text: str, hidden: re.Pattern[str] | None = None) -> None:
        """Record the answer to the last message. `hidden`: matches what it was to be without, once its calls are
        read."""
        answer = self.prompting.read_answer(text, self.tools)
        if hidden is not None:
            answer = replace(answer, content=hidden.sub("", answer.content))
        self.history = (*self.history, answer)

    def unanswered(self) -> None:
        """Take back the last message with its media."""
        self._forget(self.history[:-1])

    def take_back(self) -> str:
        """Forget the last answer and its question; return the question, whose media are shown again. Raises
        `InvalidInput` if there is none."""
        if not self.history:
            raise InvalidInput("there is no answer yet")
        *earlier, question, _ = self.history
        items = self.items
        self._forget(tuple(earlier))
        self.shown = items[len(self.items) :]
        return without_places(question.content)

    def clear(self) -> None:
        """Forget all messages and media; keep the system text and the tools."""
        self.history, self.items, self.shown = (), (), ()

    def _forget(self, kept: tuple[Message, ...]) -> None:
        """Keep these first messages and their media."""
        self.history = kept
        self.items = self.items[: sum(num_places(message.content) for message in kept)]

    def as_row(self) -> dict[str, Any]:
        """The conversation as a row of the format `openai`. Raises `InvalidInput` if there is no answer yet."""
        if not self.history:
            raise InvalidInput("there is nothing to save yet")
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        history = [replace(message, content=with_tags(message.content)) for message in self.history]
        messages = [*head, *openai_messages(history, Traits())]
        return (
            {"messages": messages} | by_column(self.items) | ({"tools": json.loads(self.tools)} if self.tools else {})
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(given: str | Sequence[str], kind: MediaKind) -> str:
    """The item in a file, or in the files of the frames of a video. Raises `InvalidInput`."""
    paths = []
    for path in [given] if isinstance(given, str) else given:
        paths.append(os.path.abspath(os.path.expanduser(path)))  # Path.expanduser raises for an unknown user
        if not os.path.isfile(paths[-1]):  # and Path.is_file for a name that is too long
            raise InvalidInput(f"{kind.name}: {path}: there is no such file")
    try:
        name = paths[0] if isinstance(given, str) else kind.path_of(paths, "the list")
        kind.measured(name)
    except RowError as fault:
        raise InvalidInput(f"{kind.name}: {fault}") from fault
    return kind.item(name)


def read_tools(text: str) -> str:
    """Check a JSON list of tools, each a function object bare or as `{"type": "function", "function": {...}}`."""
    try:
        tools = read_json(text)
    except ValueError as fault:
        raise InvalidInput(f"tools: this is not valid JSON ({fault})") from fault
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidInput("tools: this should be a JSON list of function descriptions")
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidInput(f"tools: the function {number} of the list has no name")
    return text
