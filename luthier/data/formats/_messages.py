"""Reads one message of a row: its role, its text, its thought, its calls, and what it says about the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from luthier.core.errors import RowError, ToolFault
from luthier.data.chat.answers import CALL_WORDS, split_thought
from luthier.data.formats._columns import json_text, kind, parsed_json
from luthier.data.formats._learned import Loss, loss_of
from luthier.data.media.kinds import media_kinds
from luthier.data.sources.dataset_info import Tags
from luthier.data.types import ANSWERING, THOUGHT_KEYS, Message, Role, ToolCall, ToolResult

AnyRole = Role | Literal["system"]
CALL_KEYS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")
_CALL_PARTS = ("tool_call",)
_PART_VALUE = "value"
"""Where parts of any type hold what they hold in the rows of LLaMA-Factory's v1; others name it after the type."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One message of a row: its place in words, its role (None for an unknown tag), its tag, and what it says."""

    place: str
    role: AnyRole | None
    tag: str
    content: str
    loss: Loss = None
    thought: str = ""
    calls: tuple[ToolCall, ...] = ()
    results: tuple[ToolResult, ...] = ()
    is_call: bool = False
    """Whether the tag says that it is a call, so that it is one answer with the messages of calls around it."""

    @property
    def message(self) -> Message:
        assert self.role is not None and self.role != "system", "the order of roles is checked before"
        return Message(self.role, self.content, self.loss, self.thought, self.calls, self.results)


def speak(message: Mapping[str, Any], tags: Tags, aliases: tuple[tuple[str, AnyRole], ...], place: str) -> Spoken:
    """`aliases`: the roles of names that `tags` does not give another one. Raises `RowError`."""
    tag = message_text(message, tags.role_tag, place)
    role = _roles(tags, aliases)(tag)
    if role in ANSWERING:
        return _answer(message, tags, role, tag, place)
    assert tags.content_tag is not None, "the catalog refuses tags without content_tag"
    if role == "observation":
        content = _result(message, tags.content_tag, place)
        given = {key: _name(message, key, place) for key in ("tool_call_id", "name")}
        results = (ToolResult(content, given["tool_call_id"], given["name"]),) if any(given.values()) else ()
        return Spoken(place, role, tag, content, loss_of(message, content, role, place), results=results)
    content, thought = _text(message, tags.content_tag, place)
    if thought:
        raise RowError(f"{place} of role {tag!r} has a thought, which only an answer can have", repr(tag))
    return Spoken(place, role, tag, content, loss_of(message, content, role, place))


def _answer(message: Mapping[str, Any], tags: Tags, role: AnyRole, tag: str, place: str) -> Spoken:
    assert tags.content_tag is not None, "the catalog refuses tags without content_tag"
    key = tags.content_tag
    calls = _calls(message, place)
    value = message.get(key)
    if isinstance(value, list) and any(map(_is_call_part, value)):
        if calls:
            raise ToolFault(f"{place} has calls in parts of {key!r} and beside it -> keep one of them")
        calls, value = _calls_in_parts(value, key, place)
        message = {**message, key: value}
    if role == "function" and not calls and isinstance(value, Mapping | list) and not _are_parts(value):
        listed = value if isinstance(value, list) else [value]
        calls, value = tuple(_call(call, f"call {number} of {place}") for number, call in enumerate(listed, 1)), None
        if not calls:
            raise ToolFault(f"{place} holds no call")
    if calls and value is None:
        content, parts_thought = "", ""
    else:
        content, parts_thought = _text(message, key, place)
    if calls and CALL_WORDS[0] in content:
        raise ToolFault(f"the text of {place} holds {CALL_WORDS[0]!r} beside its tool_calls")
    thought = _thought(message, content, parts_thought, place)
    loss = loss_of(message, content, role, place)
    is_call = role == "function"
    return Spoken(place, "function" if calls else role, tag, content, loss, thought, calls, is_call=is_call)


def message_text(message: Mapping[str, Any], key: str | None, place: str) -> str:
    """The text under a key of a message, such as its role."""
    assert key is not None, "the catalog refuses tags without role_tag or content_tag"
    if key not in message:
        raise RowError(f"{place} has no {key!r}")
    if not isinstance(message[key], str):
        raise RowError(f"{key!r} of {place} is {kind(message[key])}, not text")
    return message[key]


def _text(message: Mapping[str, Any], key: str, place: str) -> tuple[str, str]:
    """(text, thought) of a content: text, or a list of parts, of which those of text are joined."""
    value = message.get(key)
    if not isinstance(value, list):
        return message_text(message, key, place), ""
    texts, thoughts = [], []
    for number, part in enumerate(value, start=1):
        where = f"part {number} of {key!r} of {place}"
        if not isinstance(part, Mapping):
            raise RowError(f"{where} is {kind(part)}, not an object with 'type' and 'text'")
        what = part.get("type")
        if what in _TEXT_PARTS or (what is None and "text" in part):
            texts.append(message_text(part, _held_under(part, "text"), where))
        elif what in _THOUGHT_PARTS:
            held = part.get(what, part.get(_held_under(part, "text")))
            thoughts.append(_text({what: held}, what, where)[0])
        else:
            raise RowError(
                f"{where} is of type {what!r}, and {_why_not(what)}",
                repr(what),
            )
    return "".join(texts), "".join(thoughts)


def _held_under(part: Mapping[str, Any], key: str) -> str:
    return _PART_VALUE if key not in part and _PART_VALUE in part else key


def _is_call_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _CALL_PARTS


def _calls_in_parts(parts: list[Any], key: str, place: str) -> tuple[tuple[ToolCall, ...], list[Any] | None]:
    """(calls, the parts before them) of a content; None if there are no others. A call is an object, or its JSON."""
    first = next(index for index, part in enumerate(parts) if _is_call_part(part))
    calls = []
    for number, part in enumerate(parts[first:], start=first + 1):
        where = f"part {number} of {key!r} of {place}"
        if not _is_call_part(part):
            raise ToolFault(f"{where} follows a call -> move it before the calls")
        held = part.get(_held_under(part, part["type"]))
        calls.append(_call(parsed_json(held, where, ToolFault), where))
    return tuple(calls), parts[:first] or None


def _why_not(what: Any) -> str:
    """Why a part of this type is not read."""
    kind = next((kind for kind in media_kinds() if what in kind.parts), None)
    if kind is not None:
        return (
            f'the description of the data declares no {kind.plural} -> add "{kind.column}": "{kind.column}" to'
            " `columns`, whether or not rows have such a column"
        )
    return "this version does not train on such a part -> remove it and what the text says of it, or the row"


def _are_parts(value: Any) -> bool:
    """Whether a value is a list of parts, and not any other list of objects."""
    media = (name for kind in media_kinds() for name in kind.parts)
    known = (*_TEXT_PARTS, *_THOUGHT_PARTS, *media)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and part.get("type") in known for part in value)
    )


def _result(message: Mapping[str, Any], key: str, place: str) -> str:
    """The text of a tool's result; a value that is neither text nor a list of parts is written as JSON."""
    value = message.get(key)
    if value is None or isinstance(value, str) or _are_parts(value):
        return _text(message, key, place)[0]
    return json_text(value, f"{key!r} of {place}")


def _name(message: Mapping[str, Any], key: str, place: str) -> str:
    value = message.get(key)
    return "" if value is None else message_text(message, key, place)


def _thought(message: Mapping[str, Any], content: str, in_parts: str, place: str) -> str:
    """The thought given apart; empty if there is none, or if the content begins with the same one."""
    given = {key: message[key] for key in THOUGHT_KEYS if message.get(key)}
    for key, value in given.items():
        if not isinstance(value, str):
            raise RowError(f"{key!r} of {place} is {kind(value)}, not text")
    thoughts = {key: value for key, value in (*given.items(), ("content", in_parts)) if value.strip()}
    if len({value.strip() for value in thoughts.values()}) > 1:
        raise RowError(f"{place} has other thoughts in {' than in '.join(map(repr, thoughts))} -> keep one of them")
    thought = next(iter(thoughts.values()), "")
    inline, _ = split_thought(content)
    if not thought or not inline:
        return thought
    if inline != thought.strip():
        key = next(iter(thoughts))
        raise RowError(f"{place} has a thought in {key!r} and another one in its text -> keep one of them")
    return ""


def _calls(message: Mapping[str, Any], place: str) -> tuple[ToolCall, ...]:
    """The calls under `tool_calls`, or the one under `function_call`, which OpenAI's API had before."""
    found = {}
    for key in CALL_KEYS:
        value = parsed_json(message.get(key), f"{key!r} of {place}", ToolFault)
        if value is None or value in ([], {}):
            continue
        if key == "function_call":
            value = [value]
        if not isinstance(value, list):
            raise ToolFault(f"{key!r} of {place} is {kind(value)}, not a list")
        word = "tool call" if key == "tool_calls" else "function call"
        found[key] = tuple(_call(call, f"{word} {number} of {place}") for number, call in enumerate(value, start=1))
    if len({str([(call.name, call.arguments) for call in calls]) for calls in found.values()}) > 1:
        raise ToolFault(f"{' and '.join(map(repr, found))} of {place} hold different calls -> keep one of them")
    return next(iter(found.values()), ())


def _call(call: Any, place: str) -> ToolCall:
    """`{"id": ..., "function": {"name": ..., "arguments": ...}}`, or the function alone."""
    require_object(call, place)
    function = call if "name" in call and call.get("function") is None else call.get("function")
    require_object(function, f"the function of {place}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise ToolFault(f"the name of {place} is {kind(name)}, not text")
    if isinstance(arguments, str):
        arguments = parsed_json(arguments, f"the arguments of {place}", ToolFault, are="are")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ToolFault(f"the arguments of {place} are {kind(arguments)}, not an object")
    json_text(arguments, f"the arguments of {place}", are="are")
    return ToolCall(name, dict(arguments), _name(call, "id", place))


def require_object(value: Any, place: str) -> None:
    if not isinstance(value, Mapping):
        raise RowError(f"{place} is {kind(value)}, not an object")


@lru_cache(maxsize=64)
def _roles(tags: Tags, aliases: tuple[tuple[str, AnyRole], ...]) -> "_Roles":
    return _Roles(tags, aliases)


class _Roles:
    """Tag -> role. A tag may differ in capitals, as long as it is not another one's."""

    def __init__(self, tags: Tags, aliases: tuple[tuple[str, AnyRole], ...]) -> None:
        named: tuple[tuple[str | None, AnyRole], ...] = (
            (tags.system_tag, "system"),
            (tags.observation_tag, "observation"),
            (tags.function_tag, "function"),
            (tags.assistant_tag, "assistant"),
            (tags.user_tag, "user"),
        )
        self.exact = {tag: role for tag, role in named if tag}
        known = set(self.exact.values())
        others = {name: role for name, role in aliases if role in known}
        folded: dict[str, set[AnyRole]] = {}
        for tag, role in self.exact.items():
            folded.setdefault(tag.casefold(), set()).add(role)
        self.folded = others | {tag: next(iter(roles)) for tag, roles in folded.items() if len(roles) == 1}

    def __call__(self, tag: str) -> AnyRole | None:
        return self.exact.get(tag) or self.folded.get(tag.casefold())
