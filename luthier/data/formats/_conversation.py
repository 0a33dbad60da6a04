"""What sharegpt and openai share: from the messages of a row to an example.

A conversation alternates: the 1st, 3rd, ... message is user or observation, the 2nd, 4th, ... assistant or function.
One system message may come first. Messages are numbered as in the row, from 1. Results of tools in a row are one
observation, and messages of calls in a row are one answer with several calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.core.errors import RoleFault, RowError
from luthier.core.registry import did_you_mean
from luthier.data.chat.answers import split_thought, take_apart, thought_of
from luthier.data.formats._columns import (
    flag,
    kind,
    list_column,
    looks_like_json,
    media,
    optional_text,
    parsed_json,
    present,
    tools_text,
)
from luthier.data.formats._learned import Loss
from luthier.data.formats._messages import AnyRole, Spoken, require_object, speak
from luthier.data.formats._parts import with_media
from luthier.data.media.items import declared_kinds
from luthier.data.sources.dataset_info import DatasetSpec, Tags
from luthier.data.types import (
    ANSWERING,
    ASKING,
    RESULT_JOINER,
    Dialogue,
    Example,
    Feedback,
    Message,
    Preference,
    Role,
    Span,
    ToolResult,
)

NEEDS = ("messages", "chosen", "rejected", "kto_tag")
IGNORES = ("prompt", "query", "response", "history")
"""Keys of `columns`, see `luthier.data.formats.Format`."""
_TAG_OF = {
    "user": "user_tag",
    "human": "user_tag",
    "assistant": "assistant_tag",
    "gpt": "assistant_tag",
    "tool": "observation_tag",
    "observation": "observation_tag",
    "tool_response": "observation_tag",
    "tool_result": "observation_tag",
    "ipython": "observation_tag",
    "function_call": "function_tag",
    "tool_call": "function_tag",
    "system": "system_tag",
    "developer": "system_tag",
}
"""A role as data call it -> the key of `tags` that would name it."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one row. Raises `RowError`."""

    row: Mapping[str, Any]
    spec: DatasetSpec
    tags: Tags
    aliases: tuple[tuple[str, AnyRole], ...]

    def example(self) -> Example:
        row, columns = self.row, self.spec.columns
        if self.spec.ranking:
            return self._preference()
        spoken = self._conversation()
        system, messages = self._opened(spoken)
        _require_end(spoken, ANSWERING, self.tags)
        tools, items = tools_text(row, columns.tools), media(row, self.spec)
        if columns.kto_tag:
            return Feedback(messages, flag(row, columns.kto_tag), system=system, tools=tools, media=items)
        return Dialogue(messages, system=system, tools=tools, media=items)

    def first_message(self) -> Mapping[str, Any]:
        """The first message of the row, which shows the names of its keys; empty if it has none."""
        columns = self.spec.columns
        names = (columns.messages, *((columns.chosen, columns.rejected) if self.spec.ranking else ()))
        for name in names:
            value = self.row.get(name) if name is not None else None
            listed = parsed_json(value, f"column {name!r}", RowError) if looks_like_json(value) else value
            first = listed[:1] if isinstance(listed, list) else [listed]
            if first and isinstance(first[0], Mapping):
                return first[0]
        return {}

    def _conversation(self) -> list[Spoken]:
        column = self.spec.columns.messages
        if column is None:
            raise RowError("the answers are not whole conversations, and `columns` names no `messages` before them")
        listed = list_column(self.row, column, "messages")
        if not listed:
            raise RowError(f"column {column!r} has no messages")
        return self._spoken(listed)

    def _spoken(self, listed: Sequence[Any], of: str = "") -> list[Spoken]:
        for number, message in enumerate(listed, start=1):
            require_object(message, f"message {number}{of}")
        spoken = [self._speak(message, f"message {number}{of}") for number, message in enumerate(listed, start=1)]
        return list(_joined(spoken))

    def _speak(self, message: Mapping[str, Any], place: str) -> Spoken:
        kinds = declared_kinds(self.spec)
        if kinds:
            message = with_media(message, self.tags.content_tag, place, kinds)
        return speak(message, self.tags, self.aliases, place)

    def _opened(self, spoken: list[Spoken]) -> tuple[str | None, tuple[Message, ...]]:
        """The system text, and the messages in order. A system message takes precedence over the system column."""
        system = optional_text(self.row, self.spec.columns.system) or None
        rest = spoken
        if spoken and spoken[0].role == "system":
            if spoken[0].loss:
                raise RowError(f"{spoken[0].place}: the system text is never a target, so its 'loss' must be 0")
            system, rest = spoken[0].content, spoken[1:]
        return system, tuple(_in_order(rest, self.tags))

    def _preference(self) -> Preference:
        """`chosen` and `rejected` are a message each, or whole conversations whose beginning is the prompt."""
        columns = self.spec.columns
        assert columns.chosen is not None and columns.rejected is not None, "the catalog refuses ranking without them"
        chosen, rejected = self._answers(columns.chosen), self._answers(columns.rejected)
        are_whole = len(chosen) > 1 and len(rejected) > 1
        prompt = self._prompt(may_lack=are_whole)
        if prompt and all(_same(prompt, answers[: len(prompt)]) for answers in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        shared = _num_shared(chosen, rejected)
        for column, answers in ((columns.chosen, chosen), (columns.rejected, rejected)):
            _require_one(answers[shared:], column)
        prompt += chosen[:shared]
        system, messages = self._opened(prompt)
        _require_end(prompt, ASKING, self.tags)
        good, bad = (_as_answer(answers[-1], self.tags) for answers in (chosen, rejected))
        tools, items = tools_text(self.row, columns.tools), media(self.row, self.spec)
        return Preference(messages, good, bad, system=system, tools=tools, media=items)

    def _prompt(self, may_lack: bool) -> list[Spoken]:
        """The messages before the answers; a plain text is a question. `may_lack`: the answers may bring them."""
        column = self.spec.columns.messages
        value = None if column is None else self.row.get(column)
        if may_lack and value in (None, [], ""):
            return []
        if isinstance(value, str) and value and not looks_like_json(value):
            return [Spoken(f"column {column!r}", "user", str(self.tags.user_tag), value)]
        return self._conversation()

    def _answers(self, column: str) -> list[Spoken]:
        value = present(self.row, column)
        value = parsed_json(value, f"column {column!r}", RowError) if looks_like_json(value) else value
        if isinstance(value, list):
            if not value:
                raise RowError(f"column {column!r} has no messages")
            return self._spoken(value, f" of column {column!r}")
        if not isinstance(value, Mapping):
            raise RowError(f"column {column!r} is {kind(value)}, not a message")
        return [self._speak(value, f"the message in column {column!r}")]


def _num_shared(chosen: Sequence[Spoken], rejected: Sequence[Spoken]) -> int:
    """The number of messages that two conversations begin with, without the last one of each."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if not _same(chosen[n : n + 1], rejected[n : n + 1])), most)


def _require_one(answers: Sequence[Spoken], column: str) -> None:
    if len(answers) != 1:
        raise RowError(
            f"column {column!r} has {len(answers)} messages after the beginning that both answers share, not one"
            " message -> let the two conversations differ in their last message alone",
            str(len(answers)),
        )


def _same(ones: Sequence[Spoken], others: Sequence[Spoken]) -> bool:
    return [replace(one, place="") for one in ones] == [replace(other, place="") for other in others]


def _as_answer(answer: Spoken, tags: Tags) -> Message:
    if answer.role not in ANSWERING:
        raise RoleFault(_unexpected(answer, None, ANSWERING, tags), *_unknown(answer))
    return answer.message


def _in_order(spoken: Sequence[Spoken], tags: Tags) -> Iterator[Message]:
    before: Spoken | None = None
    for index, one in enumerate(spoken):
        expected = ANSWERING if index % 2 else ASKING
        if one.role not in expected:
            raise RoleFault(_unexpected(one, before, expected, tags), *_unknown(one))
        yield one.message
        before = one


def _require_end(spoken: Sequence[Spoken], expected: tuple[Role, ...], tags: Tags) -> None:
    if not spoken or (len(spoken) == 1 and spoken[0].role == "system"):
        raise RoleFault("there is only a system message" if spoken else "there is no question before the answers")
    if spoken[-1].role not in expected:
        last = spoken[-1]
        reason = f"the conversation ends with {last.place} of role {last.tag!r}, not with {_names(expected, tags)}"
        raise RoleFault(reason, *_unknown(last))


def _joined(spoken: Sequence[Spoken]) -> Iterator[Spoken]:
    """Messages in a row that are one: results of tools, and calls with the text before them."""
    waiting: Spoken | None = None
    for one in spoken:
        if waiting and one.role == "observation" == waiting.role:
            waiting = _with_result(waiting, one)
        elif waiting and one.is_call and (waiting.is_call or waiting.role == "assistant"):
            waiting = _with_calls(waiting, one)
        else:
            if waiting:
                yield waiting
            waiting = one
    if waiting:
        yield waiting


def _with_result(first: Spoken, second: Spoken) -> Spoken:
    results = (*_results(first), *_results(second))
    content = first.content + RESULT_JOINER + second.content
    return replace(first, content=content, loss=_joined_loss(first, second, len(RESULT_JOINER)), results=results)


def _results(one: Spoken) -> tuple[ToolResult, ...]:
    return one.results or (ToolResult(one.content),)


def _with_calls(first: Spoken, second: Spoken) -> Spoken:
    """One answer: the text before the calls, and all calls."""
    if first.loss != second.loss:
        raise RowError(f"{first.place} and {second.place} are one answer, and each has a 'loss' of its own")
    if thought_of(second.message):
        raise RowError(f"{second.place} has a thought after the beginning of its answer, {first.place}")
    before, after = take_apart(first.message), take_apart(second.message)
    beside = before.text
    if first.is_call and not first.calls and split_thought(beside)[1]:
        beside = beside.removesuffix("\n")  # of the line before the calls, which formats begin themselves
    text = "\n".join(part for part in (beside, after.text.strip("\n")) if part)
    return replace(first, role="function", content=text, calls=(*before.calls, *after.calls), is_call=True)


def _joined_loss(first: Spoken, second: Spoken, num_between: int) -> Loss:
    """The loss weights of two messages that are joined with `num_between` characters between them."""
    if first.loss == second.loss and not isinstance(first.loss, tuple):
        return first.loss
    start = len(first.content) + num_between
    later = (Span(start + s.start, start + s.end, s.weight) for s in _spans_of(second))
    return (*_spans_of(first), *later)


def _spans_of(one: Spoken) -> tuple[Span, ...]:
    if one.loss is None or not one.content:
        return ()
    return one.loss if isinstance(one.loss, tuple) else (Span(0, len(one.content), one.loss),)


def _unexpected(one: Spoken, before: Spoken | None, expected: Sequence[Role], tags: Tags) -> str:
    reason = f"{one.place} has role {one.tag!r} where {_names(expected, tags)} is expected"
    if one.role == "system":
        return f"{reason} -> put one system message at the beginning"
    if one.role is not None:
        return f"{reason} -> join it with the message before" if before and before.role == one.role else reason
    if (key := _TAG_OF.get(one.tag.casefold())) is not None:
        return f"{reason} -> name it in `tags` (`{key}`)"
    named = [tag for tag in (tags.user_tag, tags.assistant_tag, tags.observation_tag, tags.function_tag) if tag]
    return f"{reason} -> {did_you_mean(one.tag, named, repr) or 'name it in `tags`'}"


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
