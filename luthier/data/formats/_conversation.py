"""What sharegpt and openai share: from the messages of a row to an example.

A conversation alternates: the 1st, 3rd, ... message is user or observation, the 2nd, 4th, ... assistant or function.
One system message may come first. Messages are numbered as in the row, from 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from luthier.core.errors import RoleFault, RowError
from luthier.data.formats._columns import flag, kind, media, optional_text, present, tools_text
from luthier.data.sources.dataset_info import DatasetSpec, Tags
from luthier.data.types import LOSS_KEY, Dialogue, Example, Feedback, Message, Preference, Role, Span

NEEDS = ("messages", "chosen", "rejected", "kto_tag")
IGNORES = ("prompt", "query", "response", "history")
"""Keys of `columns`, see `luthier.data.formats.Format`."""
ASKING: tuple[Role, ...] = ("user", "observation")
ANSWERING: tuple[Role, ...] = ("assistant", "function")


@dataclass(frozen=True, slots=True)
class Spoken:
    """One message of a row: its place in words, its role (None for an unknown tag), its tag, its text."""

    place: str
    role: Role | Literal["system"] | None
    tag: str
    content: str
    loss: float | tuple[Span, ...] | None = None


def message_objects(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    """The messages of a row, each an object."""
    messages = present(row, column)
    if not isinstance(messages, list):
        raise RowError(f"column {column!r} is {kind(messages)}, not a list of messages")
    for number, message in enumerate(messages, start=1):
        require_object(message, f"message {number}")
    if not messages:
        raise RowError(f"column {column!r} has no messages")
    return messages


def require_object(message: Any, place: str) -> None:
    if not isinstance(message, Mapping):
        raise RowError(f"{place} is {kind(message)}, not an object")


def message_text(message: Mapping[str, Any], key: str | None, place: str) -> str:
    """The text under a key of a message, such as its role or content."""
    assert key is not None, "the catalog refuses tags without role_tag or content_tag"
    if key not in message:
        raise RowError(f"{place} has no {key!r}")
    if not isinstance(message[key], str):
        raise RowError(f"{key!r} of {place} is {kind(message[key])}, not text")
    return message[key]


def message_loss(message: Mapping[str, Any], content: str, place: str) -> float | tuple[Span, ...] | None:
    """The key `loss` of a message: a number from 0 to 1, or a list of [start, end, number] for parts of its text."""
    value = message.get(LOSS_KEY)
    if value is None:
        return None
    if not isinstance(value, list):
        return _weight(value, f"'{LOSS_KEY}' of {place}")
    spans = tuple(_span(item, len(content), f"part {n} of '{LOSS_KEY}' of {place}") for n, item in enumerate(value, 1))
    for before, after in pairwise(spans):
        if after.start < before.end:
            raise RowError(f"the parts of '{LOSS_KEY}' of {place} are not in order, or share characters")
    return spans


def joined_loss(first: "Spoken", second: "Spoken", num_between: int) -> float | tuple[Span, ...] | None:
    """The loss weights of two messages that are joined with `num_between` characters between them."""
    if first.loss == second.loss and not isinstance(first.loss, tuple):
        return first.loss
    start = len(first.content) + num_between
    later = (Span(start + s.start, start + s.end, s.weight) for s in _spans_of(second))
    return (*_spans_of(first), *later)


def _spans_of(one: "Spoken") -> tuple[Span, ...]:
    if one.loss is None or not one.content:
        return ()
    return one.loss if isinstance(one.loss, tuple) else (Span(0, len(one.content), one.loss),)


def _span(item: Any, num_characters: int, place: str) -> Span:
    if not isinstance(item, list) or len(item) != 3:
        raise RowError(f"{place} is {kind(item)}, not [start, end, number]")
    start, end, weight = item
    if not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (start, end)):
        raise RowError(f"{place}: start and end must be whole numbers")
    if not 0 <= start < end <= num_characters:
        reason = f"{place}: {start} to {end} is no part of a text of {num_characters} characters"
        raise RowError(reason, f"{start} to {end}", str(num_characters))
    return Span(start, end, _weight(weight, place))


def _weight(value: Any, place: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RowError(f"{place} is {kind(value)}, not a number")
    if not 0 <= value <= 1:
        raise RowError(f"{place} is {value}, not from 0 to 1", str(value))
    return float(value)


def role_of(tag: str, tags: Tags) -> Role | Literal["system"] | None:
    names: dict[str | None, Role | Literal["system"]] = {
        tags.system_tag: "system",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
        tags.assistant_tag: "assistant",
        tags.user_tag: "user",
    }
    return names.get(tag)


def to_example(
    row: Mapping[str, Any],
    spec: DatasetSpec,
    tags: Tags,
    spoken: Sequence[Spoken],
    speak: Callable[[Mapping[str, Any], Tags, str], Spoken],
) -> Example:
    """`speak` reads one message object; it is called for `chosen` and `rejected`, which are not in the list."""
    columns = spec.columns
    system = optional_text(row, columns.system) or None
    if spoken[0].role == "system":
        if spoken[0].loss:
            raise RowError(f"{spoken[0].place}: the system text is never a target, so its 'loss' must be 0")
        system, spoken = spoken[0].content, spoken[1:]
    messages = tuple(_in_order(spoken, tags))
    tools = tools_text(row, columns.tools)
    if spec.ranking:
        assert columns.chosen is not None and columns.rejected is not None, "the catalog refuses ranking without them"
        _require_end(spoken, ASKING, tags)
        chosen, rejected = (_answer(row, column, tags, speak) for column in (columns.chosen, columns.rejected))
        return Preference(messages, chosen, rejected, system=system, tools=tools, media=media(row, spec))
    _require_end(spoken, ANSWERING, tags)
    if columns.kto_tag:
        liked = flag(row, columns.kto_tag)
        return Feedback(messages, liked, system=system, tools=tools, media=media(row, spec))
    return Dialogue(messages, system=system, tools=tools, media=media(row, spec))


def _in_order(spoken: Sequence[Spoken], tags: Tags) -> list[Message]:
    messages = []
    for index, one in enumerate(spoken):
        expected = ANSWERING if index % 2 else ASKING
        if one.role not in expected:
            reason = f"{one.place} has role {one.tag!r} where {_names(expected, tags)} is expected"
            raise RoleFault(reason, *_unknown(one))
        messages.append(Message(one.role, one.content, one.loss))
    return messages


def _require_end(spoken: Sequence[Spoken], expected: tuple[Role, ...], tags: Tags) -> None:
    if not spoken:
        raise RoleFault("there is only a system message")
    if spoken[-1].role not in expected:
        last = spoken[-1]
        reason = f"the conversation ends with {last.place} of role {last.tag!r}, not with {_names(expected, tags)}"
        raise RoleFault(reason, *_unknown(last))


def _answer(
    row: Mapping[str, Any], column: str, tags: Tags, speak: Callable[[Mapping[str, Any], Tags, str], Spoken]
) -> Message:
    value = present(row, column)
    if not isinstance(value, Mapping):
        raise RowError(f"column {column!r} is {kind(value)}, not a message")
    answer = speak(value, tags, f"the message in column {column!r}")
    if answer.role not in ANSWERING:
        reason = f"{answer.place} has role {answer.tag!r} where {_names(ANSWERING, tags)} is expected"
        raise RoleFault(reason, *_unknown(answer))
    return Message(answer.role, answer.content, answer.loss)


def _unknown(one: Spoken) -> tuple[str, ...]:
    """The role as the row has it, if it is none of the format: it may be another one in each row."""
    return () if one.role is not None else (repr(one.tag),)


def _names(roles: Sequence[Role], tags: Tags) -> str:
    called = {
        "user": tags.user_tag,
        "observation": tags.observation_tag,
        "assistant": tags.assistant_tag,
        "function": tags.function_tag,
    }
    return " or ".join(repr(called[role]) for role in roles if called[role])
