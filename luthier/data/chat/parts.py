"""Contents as lists of parts: `[{"type": "text", "text": "What is this?"}, {"type": "image"}]`.

Chat templates of models that see or hear read images, videos and audio there. Some read nothing else and write no word
of a content that is text.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.chat.program import OpenAIMessage, run
from luthier.data.types import AUDIO_PLACE, PLACE, PLACES, VIDEO_PLACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE_OF: Mapping[str, str] = {"image": PLACE, "video": VIDEO_PLACE, "audio": AUDIO_PLACE}
"""The `type` of a part -> what stands for it in a text."""
_TYPE_OF = {place: name for name, place in PLACE_OF.items()}
_PLACE = re.compile(f"([{''.join(PLACES)}])")
_WORDS = ("Words1", "Words2", "Words3")


def as_parts(content: str) -> list[dict[str, str]]:
    """The parts of a text with a place for each item."""
    parts = [
        {"type": _TYPE_OF[text]} if text in _TYPE_OF else {"type": "text", "text": text}
        for text in _PLACE.split(content)
        if text
    ]
    return parts or [{"type": "text", "text": ""}]


def has_place(text: str) -> bool:
    return _PLACE.search(text) is not None


def num_places(text: str) -> int:
    return len(_PLACE.findall(text))


def with_marks(text: str, marks: Mapping[str, str]) -> str:
    """The text with the mark of its kind in each place."""
    return _PLACE.sub(lambda place: marks.get(_TYPE_OF[place[1]], place[1]), text)


def without_places(text: str) -> str:
    return _PLACE.sub("", text)


def in_parts(messages: Sequence[OpenAIMessage], *, all_contents: bool) -> list[OpenAIMessage]:
    """The messages with lists of parts as contents: those with items, or all of them."""
    return [
        {**message, "content": as_parts(message["content"])}
        if isinstance(message.get("content"), str) and (all_contents or has_place(message["content"]))
        else message
        for message in messages
    ]


def places_in(messages: Sequence[OpenAIMessage]) -> str:
    """The places in messages whose contents are texts, one after the other."""
    return "".join("".join(_PLACE.findall(str(message.get("content") or ""))) for message in messages)


@lru_cache(maxsize=16)
def around_item(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str, name: str, mark: str
) -> tuple[str, str] | None:
    """The texts that a chat template writes before and after every item of the kind `name`, which is `mark` in its
    text; both are empty if it moves items. None if it takes no parts of this kind.

    `chat_template`: of the tokenizer; part of the key of the cache, since a tokenizer may get another one.
    """
    item: Any = {"type": name}
    words: list[Any] = [{"type": "text", "text": word} for word in _WORDS]
    content = [words[0], item, words[1], item, words[2]]
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


def with_places(text: str, around: Mapping[str, tuple[str, str, str]], places: str) -> str:
    """A rendered text with the place of its kind for each item and what the template writes around it.

    `around`: name of a kind -> (text before an item, its mark, text after it). `places`: those of the messages, in
    order. Raises `RowError` if the template leaves an item out.
    """
    for name, (before, mark, after) in around.items():
        wanted = places.count(PLACE_OF[name])
        written = text.count(before + mark + after)
        if not written == wanted == text.count(mark):
            raise RowError(
                f"the model's own chat template writes {written} of {wanted} {name}{'' if name == 'audio' else 's'}",
                str(written),
                str(wanted),
            )
        text = text.replace(before + mark + after, PLACE_OF[name])
    if sorted(found := "".join(_PLACE.findall(text))) == sorted(places) and found != places:
        raise RowError("the model's own chat template puts images, videos and audio into another order")
    return text


def _shared(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[
        : next((at for at, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))
    ]
