"""Checks whether a description fits its data, by the first rows: columns, roles, and whether rows can be read at all.

It reports a described column that is missing; a column of the data with a known name that is not read (often because
`columns` cleared the default that reads it); a role that `tags` cleared.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from luthier.core.errors import DataError, Problem, RowError
from luthier.core.kinds import FORMATS
from luthier.core.registry import did_you_mean
from luthier.data.sources.dataset_info import MEDIA_COLUMNS, Columns, DatasetSpec, Tags
from luthier.data.sources.read import column_names, data_files, rows_in
from luthier.data.sources.readers import DataFile, Row
from luthier.data.training_keys import training_keys

NUM_FIRST_ROWS = 10
_WINDOW_BYTES = 1 << 20
_MEANT_BY_NAME = {
    **{f.name: f.name for f in fields(Columns)},
    **{f.default: f.name for f in fields(Columns) if isinstance(f.default, str)},
    **{column.removesuffix("s"): column for column in MEDIA_COLUMNS},
    "functions": "tools",
}
"""Column name in the data -> the key of `columns` that reads it."""
_PROMPTS, _ANSWERS = (
    ("instruction", "prompt", "question", "query", "text"),
    ("output", "response", "completion", "answer"),
)
"""Names of columns in data of other tools."""
_ROLES_BY_NAME = {
    **{f.default: f.name for f in fields(Tags) if isinstance(f.default, str)},
    "user": "user_tag",
    "assistant": "assistant_tag",
    "tool": "observation_tag",
}

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def check_columns(spec: DatasetSpec, *, reads_loss: bool) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings). Hub and cloud datasets are not checked, since this must work without a network.

    `reads_loss`: the training method supports loss weights of messages.
    """
    if spec.source.kind != "file":
        return [], []
    try:
        return _judged(spec, reads_loss)
    except DataError as error:
        return [_problem(spec, (), str(error).removeprefix(f"dataset {spec.name!r}: "))], []


def _judged(spec: DatasetSpec, reads_loss: bool) -> tuple[list[Problem], list[Problem]]:
    files = data_files(spec)
    rows = _first_rows(spec, files)
    names = column_names(files[0])
    usable = [row.data for row in rows if row.data is not None]
    found = list(dict.fromkeys(key for row in usable for key in row)) if names is None else names
    if not found and not _has_usable_row(spec, files):
        return [_problem(spec, (), f"no row can be used: {_first_reason(rows)}")], []
    if not found:
        return [], [_problem(spec, (), f"none of the first {len(rows)} rows can be used: {_first_reason(rows)}")]
    errors: list[Problem] = []
    warnings: list[Problem] = []
    other = _other_description(spec, found, usable)
    for key, column, reason in _absent(spec, found):
        certain = names is not None or not any(_mentions(file, column) for file in files)
        remedy = _separated(found) or other or did_you_mean(column, found, repr) or f"the data have {', '.join(found)}"
        fault = _problem(spec, ("columns", key), reason, remedy, value=column)
        (errors if certain else warnings).append(fault)
    warnings += _unread(spec, found)
    warnings += _cleared_roles(spec, usable)
    warnings += _unread_weights(spec, usable, reads_loss)
    refused = [(row, reason) for row in rows if (reason := _reason(row, spec))]
    if refused and not errors:
        row, reason = refused[0]
        hopeless = len(refused) == len(rows) and not _has_usable_row(spec, files)
        count = "no row can" if hopeless else f"{len(refused)} of the first {len(rows)} rows cannot"
        fault = _problem(spec, (), f"{count} be used, for example {row.place}: {reason}", _other_names(spec, usable))
        (errors if hopeless else warnings).append(fault)
    return errors, warnings


def _has_usable_row(spec: DatasetSpec, files: Sequence[DataFile]) -> bool:
    return any(not _reason(row, spec) for file in files for row in rows_in(file, spec))


def _problem(
    spec: DatasetSpec, path: Sequence[str], reason: str, remedy: str = "", *, value: str | None = None
) -> Problem:
    key = ".".join((spec.name, *path))
    return Problem(key, reason, remedy, value=value, has_value=value is not None, file=spec.file, line=spec.line)


def _first_rows(spec: DatasetSpec, files: Sequence[DataFile]) -> list[Row]:
    for file in files:
        rows = list(islice(rows_in(file, spec), NUM_FIRST_ROWS))
        if rows:
            return rows
    raise DataError(f"dataset {spec.name!r}: {spec.source.location} holds no rows")


def _first_reason(rows: Iterable[Row]) -> str:
    return next(f"{row.reason} ({row.place})" for row in rows if row.reason)


def _effective(spec: DatasetSpec, found: Sequence[str]) -> dict[str, str]:
    """Key of `columns` -> column, for those that the format reads."""
    columns = {f.name: getattr(spec.columns, f.name) for f in fields(Columns)}
    columns |= dict.fromkeys(FORMATS.get(spec.formatting).ignores)
    if spec.ranking:
        columns["response"] = None
    else:
        columns |= {"chosen": None, "rejected": None}
    natural = spec.formatting == "openai" and not spec.columns_given
    if natural and "messages" in found and spec.columns.messages not in found:
        columns |= {"messages": "messages", "tools": "tools" if "tools" in found else None}
    return {key: column for key, column in columns.items() if column}


def _absent(spec: DatasetSpec, found: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(key, column, reason) of described columns that the first rows lack. The default `input` may be missing."""
    for key, column in _effective(spec, found).items():
        may_lack = key in MEDIA_COLUMNS and FORMATS.get(spec.formatting).has_roles  # media may stand in messages alone
        if column not in found and not may_lack and (spec.columns_given or key in FORMATS.get(spec.formatting).needs):
            how = "" if spec.columns_given else " (the default, since `columns` is not given)"
            yield key, column, f"the data have no such column{how}"


def _separated(found: Sequence[str]) -> str:
    """What to do if the only column is a header line with another separator than a comma."""
    marks = [name for mark, name in _SEPARATORS.items() if len(found) == 1 and mark in found[0]]
    return f"the file separates its columns by {marks[0]}: save it with commas" if marks else ""


def _other_description(spec: DatasetSpec, found: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """What to write for data with the columns of another format, or with those of other tools."""
    if spec.columns_given:
        return ""
    for column, key, formatting in (("messages", "role", "openai"), ("conversations", "from", "sharegpt")):
        first = next((row[column] for row in rows if row.get(column)), None)
        has_key = isinstance(first, list) and isinstance(first[0], Mapping) and key in first[0]
        if has_key and formatting != spec.formatting:
            return f'set "formatting": "{formatting}"'
    prompt, answer = (next((name for name in names if name in found), None) for names in (_PROMPTS, _ANSWERS))
    if spec.formatting != "alpaca" or spec.ranking or prompt is None or (answer is None and prompt != "text"):
        return ""
    columns = {"prompt": prompt} | ({"response": answer} if answer else {})
    return f'add "columns": {json.dumps(columns)}'


def _other_names(spec: DatasetSpec, rows: Iterable[Mapping[str, Any]]) -> str:
    """What to write if the first message names role and text otherwise than the description says."""
    message = next((message for row in rows for message in _messages(row, spec)), {})
    if not FORMATS.get(spec.formatting).has_roles or not message or spec.tags.role_tag in message:
        return ""
    if spec.formatting != "openai" and not spec.tags_given and message.keys() >= {"role", "content"}:
        return 'set "formatting": "openai", whose messages have role and content'
    return f"name them in `tags`: the message has {', '.join(message)}"


def _mentions(file: DataFile, column: str) -> bool:
    """Whether a JSON file contains the name of the column anywhere, so that a later row may have it."""
    name, rest = f'"{column}"'.encode(), b""
    with file.open() as stream:
        while data := stream.read(_WINDOW_BYTES):
            if name in rest + data:
                return True
            rest = data[-len(name) :]
    return False


def _unread(spec: DatasetSpec, found: Sequence[str]) -> Iterator[Problem]:
    effective = _effective(spec, found)
    for column in found:
        key = _MEANT_BY_NAME.get(column)
        if key is None or key in effective or column in effective.values():
            continue
        if key in FORMATS.get(spec.formatting).ignores:
            continue
        by_default = getattr(Columns(), key) is not None
        why = "giving `columns` cleared the default that reads it" if by_default else f"`columns` names no {key!r}"
        yield _problem(spec, ("columns",), f"the column {column!r} of the data is not read: {why}",
                       f'add "{key}": "{column}", or remove the column from the data')  # fmt: skip


def _cleared_roles(spec: DatasetSpec, rows: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    if not FORMATS.get(spec.formatting).has_roles or not spec.tags_given:
        return
    tags = {f.name: getattr(spec.tags, f.name) for f in fields(Tags)}
    written = (message.get(spec.tags.role_tag or "") for row in rows for message in _messages(row, spec))
    for role in dict.fromkeys(role for role in written if isinstance(role, str)):
        key = _ROLES_BY_NAME.get(role)
        if role not in tags.values() and key is not None and tags[key] is None:
            reason = (
                f"the data have messages of role {role!r}, and giving `tags` cleared {key!r}: such rows are dropped"
            )
            yield _problem(spec, ("tags",), reason, f'add "{key}": "{role}"')


def _unread_weights(spec: DatasetSpec, rows: Iterable[Mapping[str, Any]], reads_loss: bool) -> Iterator[Problem]:
    """Reports what messages say about their loss, under the key of this or of other tools, if it is not read."""
    if not FORMATS.get(spec.formatting).has_roles:
        return
    if reads_loss:
        return
    for key in sorted({key for row in rows for message in _messages(row, spec) for key in training_keys(message)}):
        reason = f"messages carry {key!r}, which is not read: every answer counts in full"
        yield _problem(spec, (), reason, "use stage: sft, or leave out the rows that should not count")


def _messages(row: Mapping[str, Any], spec: DatasetSpec) -> Iterator[Mapping[str, Any]]:
    messages = row.get(spec.columns.messages or "messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping):
            yield message


def _reason(row: Row, spec: DatasetSpec) -> str:
    """Why the row cannot be used; empty if it can."""
    try:
        FORMATS.get(spec.formatting).read(row.usable(), spec)
    except RowError as error:
        return str(error)
    return ""
