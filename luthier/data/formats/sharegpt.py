"""Conversations of `{"from": role, "value": text}` objects; tool calls are messages of their own role."""

from collections.abc import Mapping
from typing import Any

from luthier.data.formats import Format
from luthier.data.formats._conversation import (
    IGNORES,
    NEEDS,
    Spoken,
    message_loss,
    message_objects,
    message_text,
    role_of,
    to_example,
)
from luthier.data.sources.dataset_info import DatasetSpec, Tags
from luthier.data.types import Example


def read(row: Mapping[str, Any], spec: DatasetSpec) -> Example:
    assert spec.columns.messages is not None, "the catalog refuses sharegpt without messages"
    messages = message_objects(row, spec.columns.messages)
    spoken = [speak(message, spec.tags, f"message {number}") for number, message in enumerate(messages, start=1)]
    return to_example(row, spec, spec.tags, spoken, speak)


def speak(message: Mapping[str, Any], tags: Tags, place: str) -> Spoken:
    tag = message_text(message, tags.role_tag, place)
    content = message_text(message, tags.content_tag, place)
    return Spoken(place, role_of(tag, tags), tag, content, message_loss(message, content, place))


FORMAT = Format(name="sharegpt", read=read, needs=NEEDS, ignores=IGNORES, has_roles=True)
