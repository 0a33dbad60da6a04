"""Questions with an answer: `instruction` and `input` are the prompt, `output` is the answer, `history` comes first.

A row without an answer (a missing column, or null) is a Prompt: plain text for pt, a task for ppo.
"""

from collections.abc import Mapping
from typing import Any

from luthier.core.errors import RowError
from luthier.data.formats import Format
from luthier.data.formats._columns import flag, kind, list_column, media, optional_text, present, tools_text
from luthier.data.sources.dataset_info import DatasetSpec
from luthier.data.types import Dialogue, Example, Feedback, Message, Preference, Prompt


def read(row: Mapping[str, Any], spec: DatasetSpec) -> Example:
    columns = spec.columns
    if columns.prompt:
        present(row, columns.prompt)
    parts = (optional_text(row, columns.prompt), optional_text(row, columns.query))
    prompt = "\n".join(part for part in parts if part)
    messages = (*_history(row, columns.history), Message("user", prompt))
    system, tools = optional_text(row, columns.system) or None, tools_text(row, columns.tools)
    if spec.ranking:
        assert columns.chosen is not None and columns.rejected is not None, "the catalog refuses ranking without them"
        chosen, rejected = _answer(row, columns.chosen), _answer(row, columns.rejected)
        return Preference(messages, chosen, rejected, system=system, tools=tools, media=media(row, spec))
    answer = present(row, columns.response) if columns.response else None
    if columns.kto_tag:
        assert columns.response is not None, "the catalog refuses kto_tag without response"
        messages = (*messages, _answer(row, columns.response))
        liked = flag(row, columns.kto_tag)
        return Feedback(messages, liked, system=system, tools=tools, media=media(row, spec))
    if answer is not None:
        assert columns.response is not None, "an answer has a column"
        messages = (*messages, _answer(row, columns.response))
        return Dialogue(messages, system=system, tools=tools, media=media(row, spec))
    if not prompt:
        raise RowError("the row has neither a prompt nor an answer")
    return Prompt(messages, system=system, tools=tools, media=media(row, spec))


def _answer(row: Mapping[str, Any], column: str) -> Message:
    value = present(row, column)
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        reason = f"column {column!r} is a list of messages, not text"
        raise RowError(f'{reason} -> describe the data with "formatting": "openai" or "sharegpt"')
    if not isinstance(value, str):
        raise RowError(f"column {column!r} is {kind(value)}, not text")
    return Message("assistant", value)


def _history(row: Mapping[str, Any], column: str | None) -> tuple[Message, ...]:
    if column is None or row.get(column) in (None, ""):
        return ()
    pairs = list_column(row, column, "[question, answer] pairs")
    messages: list[Message] = []
    for number, pair in enumerate(pairs, start=1):
        where = f"pair {number} of column {column!r}"
        if not isinstance(pair, list):
            raise RowError(f"{where} is {kind(pair)}, not a [question, answer] list")
        if len(pair) != 2:
            raise RowError(f"{where} has {len(pair)} items, not 2 (question and answer)")
        for name, text in zip(("question", "answer"), pair, strict=True):
            if not isinstance(text, str):
                raise RowError(f"the {name} of {where} is {kind(text)}, not text")
        messages += (Message("user", pair[0]), Message("assistant", pair[1]))
    return tuple(messages)


FORMAT = Format(
    name="alpaca",
    read=read,
    needs=("prompt", "response", "chosen", "rejected", "kto_tag"),
    ignores=("messages",),
    has_roles=False,
)
