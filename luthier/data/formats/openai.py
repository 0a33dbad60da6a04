"""Messages in the form of OpenAI's chat API: `role`, `content`, `tool_calls`, and the role `tool`.

What differs from sharegpt:
- an assistant message with `tool_calls` becomes one function message, the JSON list of its calls. Text next to the
  calls is kept in front of them, and the calls are then enclosed in `<tool_call>` tags;
- consecutive tool messages become one observation;
- without `tags` in the description, rows with `role` are read with OpenAI's names instead of sharegpt's; without
  `columns`, rows with `messages` are read from `messages` and `tools`. Given values always take precedence.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.core.errors import ToolFault
from luthier.data.formats import Format
from luthier.data.formats._columns import kind
from luthier.data.formats._conversation import (
    IGNORES,
    NEEDS,
    Spoken,
    joined_loss,
    message_loss,
    message_objects,
    message_text,
    require_object,
    role_of,
    to_example,
)
from luthier.data.sources.dataset_info import DatasetSpec, Tags
from luthier.data.types import Example

OBSERVATION_JOINER = "\n</tool_response>\n<tool_response>\n"
_OWN_TAGS = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
    function_tag=None,
    system_tag="system",
)


def read(row: Mapping[str, Any], spec: DatasetSpec) -> Example:
    if not spec.columns_given and "messages" in row and spec.columns.messages not in row:
        spec = replace(spec, columns=replace(spec.columns, messages="messages", tools="tools"))
    assert spec.columns.messages is not None, "the catalog refuses openai without messages"
    messages = message_objects(row, spec.columns.messages)
    own_names = not spec.tags_given and "role" in messages[0] and spec.tags.role_tag not in messages[0]
    tags = _OWN_TAGS if own_names else spec.tags
    spoken = [speak(message, tags, f"message {number}") for number, message in enumerate(messages, start=1)]
    return to_example(row, spec, tags, list(_joined(spoken)), speak)


def speak(message: Mapping[str, Any], tags: Tags, place: str) -> Spoken:
    tag = message_text(message, tags.role_tag, place)
    role = role_of(tag, tags)
    if role in ("assistant", "function") and message.get("tool_calls"):
        content = _calls_text(message, tags, place)
        return Spoken(place, "function", tag, content, message_loss(message, content, place))
    content = message_text(message, tags.content_tag, place)
    return Spoken(place, role, tag, content, message_loss(message, content, place))


def _joined(spoken: Sequence[Spoken]) -> Iterator[Spoken]:
    waiting: Spoken | None = None
    for one in spoken:
        if waiting and one.role == "observation":
            loss = joined_loss(waiting, one, len(OBSERVATION_JOINER))
            waiting = replace(waiting, content=waiting.content + OBSERVATION_JOINER + one.content, loss=loss)
            continue
        if waiting:
            yield waiting
        waiting = one if one.role == "observation" else None
        if not waiting:
            yield one
    if waiting:
        yield waiting


def _calls_text(message: Mapping[str, Any], tags: Tags, place: str) -> str:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise ToolFault(f"'tool_calls' of {place} is {kind(calls)}, not a list")
    functions = [_function(call, f"tool call {number} of {place}") for number, call in enumerate(calls, start=1)]
    text = json.dumps(functions, ensure_ascii=False)
    beside = message.get(tags.content_tag or "")
    if beside is None or beside == "":
        return text
    beside = message_text(message, tags.content_tag, place)
    if "<tool_call>" in beside:
        raise ToolFault(f"the text of {place} holds '<tool_call>' beside its tool_calls")
    return f"{beside}\n<tool_call>{text}</tool_call>"


def _function(call: Any, place: str) -> dict[str, Any]:
    require_object(call, place)
    function = call.get("function")
    require_object(function, f"the function of {place}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise ToolFault(f"the name of {place} is {kind(name)}, not text")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ToolFault(f"the arguments of {place} are not JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ToolFault(f"the arguments of {place} are {kind(arguments)}, not an object")
    return {"name": name, "arguments": arguments}


FORMAT = Format(name="openai", read=read, needs=NEEDS, ignores=IGNORES, has_roles=True)
