"""Messages in the form of OpenAI's chat API: `role`, `content`, `tool_calls`, and the role `tool`.

What differs from sharegpt:
- messages of the role `function`, which API versions before `tool` had, are results of calls;
- without `tags` in the description, rows with `role` are read with OpenAI's names instead of sharegpt's; without
  `columns`, rows with `messages` are read from `messages` and `tools`. Given values always take precedence.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.data.formats import Format
from luthier.data.formats._conversation import IGNORES, NEEDS, Reader
from luthier.data.formats._messages import AnyRole
from luthier.data.sources.dataset_info import DatasetSpec, Tags
from luthier.data.types import Example

_OWN_TAGS = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
    function_tag=None,
    system_tag="system",
)
_ALIASES: tuple[tuple[str, AnyRole], ...] = (("developer", "system"), ("function", "observation"))


def read(row: Mapping[str, Any], spec: DatasetSpec) -> Example:
    if not spec.columns_given and "messages" in row and spec.columns.messages not in row:
        spec = replace(spec, columns=replace(spec.columns, messages="messages", tools="tools"))
    reader = Reader(row, spec, spec.tags, _ALIASES)
    first = reader.first_message()
    own_names = not spec.tags_given and "role" in first and spec.tags.role_tag not in first
    return replace(reader, tags=_OWN_TAGS).example() if own_names else reader.example()


FORMAT = Format(name="openai", read=read, needs=NEEDS, ignores=IGNORES, has_roles=True)
