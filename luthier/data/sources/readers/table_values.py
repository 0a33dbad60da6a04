"""Rows of Arrow tables as JSON values.

A table gives each struct all members that any row has, with null where a row had none. So null members of structs are
left out. Nulls in lists, in maps and in JSON text were written by someone, and stay.

Dates and times become ISO 8601 text, decimals numbers, maps objects. A value without a form in JSON (bytes, durations,
NaN) makes its row unusable, with the place of the value as the reason.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from luthier.core.errors import RowError

if TYPE_CHECKING:
    import pyarrow as pa

Cell = Any
"""A value, or the `RowError` of a value that has no form in JSON."""
Convert = Callable[[Any, str], Any]
"""(value as pyarrow gives it, its place) -> the JSON value. Raises `RowError`."""


def rows_of(
    batch: "pa.RecordBatch | pa.Table", columns: Collection[str] | None = None, *, media: Collection[str] = ()
) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a batch, or why one cannot be used, with these columns (None: all).

    The cells of `media` columns stay as they are. So do those of other columns that are neither lists nor objects: a
    format says what is wrong with a date where it expects text.
    """
    names, cells = [], []
    for index, field in enumerate(batch.schema):
        if columns is None or field.name in columns:
            names.append(field.name)
            cells.append(_cells(batch.column(index), field, as_json=field.name not in media))
    for number in range(batch.num_rows):
        row = {name: values[number] for name, values in zip(names, cells, strict=True)}
        yield next((cell for cell in row.values() if isinstance(cell, RowError)), row)


def plain_row(row: Mapping[str, Any], columns: Collection[str], *, media: Collection[str] = ()) -> dict[str, Any]:
    """A row of a table that a client gives as Python values. Raises `RowError`."""
    return {
        name: _any(value, name) if isinstance(value, (Mapping, list)) and name not in media else value
        for name, value in row.items()
        if name in columns
    }


def _cells(array: "pa.Array | pa.ChunkedArray", field: "pa.Field", *, as_json: bool) -> list[Cell]:
    import pyarrow as pa

    holds_others = field.type.num_fields or isinstance(field.type, (pa.BaseExtensionType, pa.DictionaryType))
    convert = _converter(field.type) if as_json and holds_others else None
    try:
        values = array.to_pylist()
    # One value that Python has no type for spoils them all. A time zone that it does not know is a LookupError.
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError):
        return [_cell(scalar, field, convert) for scalar in array]
    return values if convert is None else [_converted(value, field.name, convert) for value in values]


def _cell(scalar: "pa.Scalar", field: "pa.Field", convert: Convert | None) -> Cell:
    import pyarrow as pa

    try:
        value = scalar.as_py()
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError) as error:
        why = str(error).strip().partition("\n")[0]
        return RowError(f"column {field.name!r} holds a value that cannot be read ({why})", why)
    return value if convert is None else _converted(value, field.name, convert)


def _converted(value: Any, column: str, convert: Convert) -> Cell:
    try:
        return None if value is None else convert(value, column)
    except RowError as error:
        return error


def _is_json(kind: "pa.DataType") -> bool:
    """Whether values are JSON text by their type, as those of the feature `Json` of the library `datasets`."""
    import pyarrow as pa

    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def _converter(kind: "pa.DataType") -> Convert:
    """For values that are not null."""
    import pyarrow.types as types

    if _is_json(kind):
        return _parsed
    if types.is_struct(kind):
        return _struct({kind.field(index).name: _converter(kind.field(index).type) for index in range(kind.num_fields)})
    if types.is_map(kind):
        return _map(_converter(kind.item_type))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_nested(kind) and kind.num_fields == 1 and not types.is_union(kind):
        return _list(_converter(kind.field(0).type))
    return _any


def _struct(members: Mapping[str, Convert]) -> Convert:
    def convert(value: Any, place: str) -> Any:
        return {name: members[name](member, f"{place}.{name}") for name, member in value.items() if member is not None}

    return convert


def _list(item: Convert) -> Convert:
    def convert(value: Any, place: str) -> Any:
        return [None if member is None else item(member, f"{place}[{index}]") for index, member in enumerate(value)]

    return convert


def _map(item: Convert) -> Convert:
    def convert(value: Any, place: str) -> Any:
        found: dict[str, Any] = {}
        for name, member in value:
            if not isinstance(name, str):
                raise RowError(f"a key in JSON is text, not {name!r}: {place}", repr(name), place)
            if name in found:
                raise RowError(f"the key {name!r} appears twice in one object: {place}", repr(name), place)
            found[name] = None if member is None else item(member, f"{place}.{name}")
        return found

    return convert


def _parsed(value: Any, place: str) -> Any:
    def refuse(word: str) -> Any:
        raise RowError(f"{word} has no form in JSON: {place}", place)

    try:
        return json.loads(value, parse_constant=refuse)
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}: {place}", str(error), place) from error


def _any(value: Any, place: str) -> Any:
    """The JSON value of a Python value, where the table has no narrower type than that."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case date() | time():
            return value.isoformat()
        case Decimal() if value.is_finite():
            return _number(value, place)
        case UUID():
            return str(value)
        case Mapping():
            return {name: _any(member, f"{place}.{name}") for name, member in value.items() if member is not None}
        case list():
            return [_any(member, f"{place}[{index}]") for index, member in enumerate(value)]
    shown = str(value) if isinstance(value, (float, Decimal)) else f"a value of type {type(value).__name__}"
    raise RowError(f"{shown} has no form in JSON: {place}", place)


def _number(value: Decimal, place: str) -> int | float:
    """The same number; a fraction needs a float that is exactly it when it is read back."""
    if value == value.to_integral_value() and value.as_tuple().exponent >= 0:  # type: ignore[operator]
        return int(value)
    number = float(value)
    if Decimal(repr(number)) != value:
        raise RowError(f"{value} has more digits than a number in JSON keeps: {place}", str(value), place)
    return number
