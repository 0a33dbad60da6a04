"""Contents as lists of parts: `[{"type": "text", "text": "What is this?"}, {"type": "image"}]`.

Chat templates of models that see read images there. Some read nothing else and write no word of a content that is text.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.chat.program import OpenAIMessage, run
from luthier.data.types import PLACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = ("Words1", "Words2", "Words3")


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
    """The texts that a chat template writes before and after every image, which is `mark` in its text; both are empty
    if it moves images. None if it takes no parts.

    `chat_template`: of the tokenizer; part of the key of the cache, since a tokenizer may get another one.
    """
    image: Any = {"type": "image"}
    words: list[Any] = [{"type": "text", "text": word} for word in _WORDS]
    content = [words[0], image, words[1], image, words[2]]
    try:
        text = run(tokenizer, [{"role": "user", "content": content}], asks=True, switches={})
    except RowError:
        return None
    if text.count(mark) != 2 or "'type'" in text or any(word not in text for word in _WORDS):
        return None
    found = re.search("(.*?)".join(_WORDS), text, re.DOTALL)
    pairs = [] if found is None else [between.partition(mark) for between in found.groups()]
    if not all(middle for _, middle, _ in pairs):
        return "", ""
    before = _shared([first[::-1] for first, _, _ in pairs])[::-1]  # a number before each of them is no part of it
    after = _shared([last for _, _, last in pairs])
    return before.lstrip(), after.rstrip()


def _shared(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[
        : next((at for at, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))
    ]
