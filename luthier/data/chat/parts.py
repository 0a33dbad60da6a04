"""Contents as lists of parts: `[{"type": "text", "text": "What is this?"}, {"type": "image"}]`.

Chat templates of models that see read images there. Some read nothing else and write no word of a content that is text.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.chat.program import OpenAIMessage, run
from luthier.data.types import PLACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE, _AFTER = "Words1", "Words2"


def as_parts(content: str) -> list[dict[str, str]]:
    """The parts of a text with `PLACE` for each image."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(PLACE)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts or [{"type": "text", "text": ""}]


def in_parts(messages: Sequence[OpenAIMessage], *, all_contents: bool) -> list[OpenAIMessage]:
    """The messages with lists of parts as contents: those with images, or all of them."""
    return [
        {**message, "content": as_parts(message["content"])}
        if isinstance(message.get("content"), str) and (all_contents or PLACE in message["content"])
        else message
        for message in messages
    ]


def num_places(messages: Sequence[OpenAIMessage]) -> int:
    """The number of images in messages whose contents are texts."""
    return sum(str(message.get("content") or "").count(PLACE) for message in messages)


@lru_cache(maxsize=8)
def around_image(tokenizer: "PreTrainedTokenizerBase", chat_template: str, mark: str) -> tuple[str, str] | None:
    """The texts that a chat template writes before and after an image, which is `mark` in its text; both are empty if
    it moves images. None if it takes no parts.

    `chat_template`: of the tokenizer; part of the key of the cache, since a tokenizer may get another one.
    """
    content: Any = [{"type": "text", "text": _BEFORE}, {"type": "image"}, {"type": "text", "text": _AFTER}]
    try:
        text = run(tokenizer, [{"role": "user", "content": content}], asks=True, switches={})
    except RowError:
        return None
    if text.count(mark) != 1 or "'type'" in text or _BEFORE not in text or _AFTER not in text:
        return None
    start, end = text.index(_BEFORE) + len(_BEFORE), text.index(_AFTER)
    before, found, after = text[start:end].partition(mark)
    return (before.strip(), after.strip()) if found else ("", "")
