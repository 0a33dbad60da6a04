"""Conversations of `{"from": role, "value": text}` objects; tool calls are messages of their own role.

Calls may also be given as in OpenAI's API, under `tool_calls` or `function_call` of an answer.
"""

from collections.abc import Mapping
from typing import Any

from luthier.data.formats import Format
from luthier.data.formats._conversation import IGNORES, NEEDS, Reader
from luthier.data.formats._messages import AnyRole
from luthier.data.sources.dataset_info import DatasetSpec
from luthier.data.types import Example

_ALIASES: tuple[tuple[str, AnyRole], ...] = (("developer", "system"),)


def read(row: Mapping[str, Any], spec: DatasetSpec) -> Example:
    return Reader(row, spec, spec.tags, _ALIASES).example()


FORMAT = Format(name="sharegpt", read=read, needs=NEEDS, ignores=IGNORES, has_roles=True)
