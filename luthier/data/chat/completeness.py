"""Proves that an answer is learned as the data give it: its thought, its text and its calls stand in what was rendered.

A chat format may put other words around them and trim whitespace at their ends. It may write the value of an argument
as JSON, in Python's spelling, or as bare text.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.core.errors import RowError, ToolFault
from luthier.data.chat.answers import CALL_WORDS, THINKING_TAGS, split_thought, take_apart, thought_of
from luthier.data.types import Dialogue, Example, Feedback, Message, Preference, Prompt

_SHOWN_CHARS = 60
_TAKEN = "\0"
"""Stands for a text that was found, so that it is not taken for another text of the answer too."""


def require_complete(
    message: Message,
    rendered: str,
    *,
    thoughts_dropped: bool = False,
    thinking_tags: tuple[str, str] = THINKING_TAGS,
    tool_call_words: tuple[str, str] = CALL_WORDS,
) -> None:
    """Raises `RowError` with the text of an assistant or function message that `rendered`, its rendering, lacks.

    `thoughts_dropped`: the thought is left out by the user's wish (`enable_thinking: false`). The tags are those
    around thoughts and calls in the data.
    """
    answer = take_apart(message, thinking_tags, (tool_call_words, CALL_WORDS))
    inline, text = split_thought(answer.text, thinking_tags)
    thoughts = () if thoughts_dropped else (message.thought, inline or "")
    left = rendered
    for name, part in (*(("thought", thought) for thought in thoughts), ("text", text)):
        words = part.strip()
        if words and words not in left:
            raise _lost(f"the {name} of an answer", words)
        left = left.replace(words, _TAKEN, 1) if words else left
    at = 0
    for call in answer.calls:
        place = left.find(call.name, at)
        if place < 0:
            raise ToolFault(f"the chat format does not write the call of {call.name!r} (tool_calls)", repr(call.name))
        at = place + len(call.name)
        for leaf in _leaves(call.arguments):
            if not any(spelling in left for spelling in _spellings(leaf)):
                raise _lost(f"an argument of the call of {call.name!r}", str(leaf), repr(call.name))


def learned_answers(example: Example, only_last: bool = False) -> tuple[Message, ...]:
    """The answers that a row teaches. `only_last`: of a dialogue, the last one alone."""
    match example:
        case Dialogue(messages=messages):
            return messages[-1:] if only_last else messages[1::2]
        case Preference(chosen=chosen, rejected=rejected):
            return (chosen, rejected)
        case Feedback(messages=messages):
            return messages[-1:]
        case Prompt():
            return ()


def num_left_out(answers: Sequence[Message], rendered: str, thinking_tags: tuple[str, str] = THINKING_TAGS) -> int:
    """How many of the answers lose their thought: it stands nowhere in `rendered`, which has all of them."""
    thoughts = (thought_of(answer, thinking_tags) or thought_of(answer) for answer in answers)
    return sum(thought.strip() not in rendered for thought in thoughts)


def _lost(what: str, text: str, *quoted: str) -> RowError:
    shown = repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")
    return RowError(f"the chat format does not write {what}, which would not be learned: {shown}", *quoted, shown)


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and values inside a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _spellings(leaf: Any) -> Iterator[str]:
    """How formats write a value: bare, as JSON, as JSON inside JSON text, in Python's spelling."""
    if not isinstance(leaf, str):
        yield json.dumps(leaf)
        yield str(leaf)
        return
    yield leaf.strip()
    for in_ascii in (False, True):
        inside = json.dumps(leaf, ensure_ascii=in_ascii)[1:-1]
        yield inside
        yield json.dumps(inside, ensure_ascii=in_ascii)[1:-1]
    yield repr(leaf)[1:-1]
