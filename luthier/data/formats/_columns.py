"""Typed access to the columns that all formats share. A value of another type is a `RowError` with the column."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from luthier.core.errors import RowError, ToolFault
from luthier.data.chat.answers import read_json, require_shallow
from luthier.data.media.items import column_of, declared_kinds, item_in
from luthier.data.media.kinds import MediaKind
from luthier.data.sources.dataset_info import DatasetSpec
from luthier.data.types import Media

Row = Mapping[str, Any]
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    (str, "text"),
    ((int, float), "a number"),
    (Mapping, "an object"),
    ((list, tuple), "a list"),
)
_FLAGS: Mapping[bool | float | str, bool] = {
    True: True,
    "true": True,
    "1": True,
    "1.0": True,
    False: False,
    "false": False,
    "0": False,
    "0.0": False,
}
"""Value of a boolean column, text in small letters -> what it means. 1 and 1.0 equal True, 0 and 0.0 False."""


def kind(value: Any) -> str:
    """The type of a value, in words that fit after "is"."""
    if value is None:
        return "null"
    for types, words in _KINDS:
        if isinstance(value, types):
            return words
    return f"of type {type(value).__name__}"


def optional_text(row: Row, column: str | None) -> str:
    """The text of a column that rows may leave out; empty when it is absent or null."""
    value = row.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise RowError(f"column {column!r} is {kind(value)}, not text")
    return value or ""


def present(row: Row, column: str) -> Any:
    """The value of a required column."""
    if column not in row:
        raise RowError(f"column {column!r} is missing")
    return row[column]


def flag(row: Row, column: str) -> bool:
    """A boolean column. Tables have it as 0 and 1 too, and csv files have all of these as text."""
    value = present(row, column)
    word = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(word, (bool, int, float, str)) or word not in _FLAGS:
        raise RowError(f"column {column!r} is {kind(value)}, not true, false, 1 or 0")
    return _FLAGS[word]


def looks_like_json(value: Any) -> bool:
    """Whether a value is a text that may be JSON of a list or an object."""
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def parsed_json(value: Any, what: str, fault: type[RowError], are: str = "is") -> Any:
    """The value of JSON text, None for blank text; other values as they are. Raises `fault`."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value) if value.strip() else None
    except ValueError as error:
        raise fault(f"{what} {are} not JSON: {error}") from error


def json_text(value: Any, what: str, are: str = "is") -> str:
    """A value as JSON text. Raises `ToolFault` for one that JSON does not have, such as a date or NaN."""
    try:
        require_shallow(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise ToolFault(f"{what} {are} no JSON value: it holds an unpaired surrogate") from error
    except (TypeError, ValueError) as error:
        raise ToolFault(f"{what} {are} no JSON value: {error}") from error


def list_column(row: Row, column: str, of: str) -> Any:
    """A required column of lists, which may be JSON text; a text that cannot be a list is refused as such."""
    value = present(row, column)
    listed = parsed_json(value, f"column {column!r}", RowError) if looks_like_json(value) else value
    if not isinstance(listed, list):
        raise RowError(f"column {column!r} is {kind(listed)}, not a list of {of}")
    return listed


def tools_text(row: Row, column: str | None) -> str:
    """The list of tools as JSON text; empty when there are none. Takes JSON text, a list or a single tool.

    Null, an empty list, blank text, and JSON text of null or of an empty list say that there are none.
    """
    value = row.get(column) if column else None
    tools = parsed_json(value, f"column {column!r}", ToolFault)
    if tools is None:
        return ""
    if isinstance(tools, Mapping):
        tools = [tools]
        value = tools
    if not isinstance(tools, list):
        raise ToolFault(f"column {column!r} is {kind(tools)}, not a list of tools")
    for index, tool in enumerate(tools, start=1):
        _check_tool(tool, f"tool {index} of column {column!r}")
    if not tools:
        return ""
    return value if isinstance(value, str) else json_text(value, f"column {column!r}")


def _check_tool(tool: Any, where: str) -> None:
    """A bare function, or `{"type": "function", "function": {...}}`."""
    if not isinstance(tool, Mapping):
        raise ToolFault(f"{where} is {kind(tool)}, not an object")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise ToolFault(f"the function of {where} is {kind(function)}, not an object")
    if not isinstance(function.get("name"), str):
        raise ToolFault(f"{where} has no name")


def media(row: Row, spec: DatasetSpec) -> Media:
    """The items of the media columns. Relative paths start from `media_dir`; bytes are written to the cache."""
    return Media(tuple(item for medium in declared_kinds(spec) for item in _items(row, medium, spec)))


def _items(row: Row, medium: MediaKind, spec: DatasetSpec) -> Iterator[str]:
    column = column_of(spec, medium)
    value = row.get(column) if column else None
    if value is None:
        return
    items = [value] if isinstance(value, (str, bytes, Mapping)) else value
    if not isinstance(items, (list, tuple)):
        raise RowError(f"column {column!r} is {kind(value)}, not a list of paths")
    for index, item in enumerate(items, start=1):
        place = f"item {index} of column {column!r}"
        if not isinstance(item, (str, bytes, Mapping, *medium.others)):
            raise RowError(f"{place} is {kind(item)}, not a path")
        yield item_in(medium.path_of(item, place), medium, spec)
