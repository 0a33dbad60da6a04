"""Rows of JSON files: one array of objects, or one object per line. The first character decides, not the file name.

An array is read through a window that grows only if a single value does not fit. So memory depends on the longest row,
not on the file, and the first row of a big file is read quickly.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from luthier.core.errors import DataError, RowError
from luthier.data.sources.readers import DataFile, Row, text

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CUT_MARGIN = 16
"""An error this close to the end of the window may be due to the cut: JSON words and escapes are shorter."""
_SHOWN = 40


class _RepeatedKey(RowError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"the key {repeated!r} appears twice in one object", repr(repeated))
    return found


class _Decoder(json.JSONDecoder):
    """Decodes rows, of which a format may read `columns` (empty: any), and notes whether a number is not finite."""

    def __init__(self, columns: Collection[str]) -> None:
        super().__init__(object_pairs_hook=_object, parse_float=self._float, parse_constant=self._float)
        self.columns, self.found_odd = columns, False

    def _float(self, text: str) -> float:
        number = float(text)  # also of NaN, Infinity and 1e999, which Python reads and writes
        self.found_odd = self.found_odd or not math.isfinite(number)
        return number


# Finds the end of a value whose content the strict decoder refuses.
_LENIENT = json.JSONDecoder(parse_int=str, strict=False)


def read_json(file: DataFile, columns: Collection[str] = ()) -> Iterator[Row]:
    """Rows of a .json or .jsonl file. Raises `DataError` where the rest of the file cannot be read.

    `columns`: those that a row may have. They tell a file with one row from an object that holds the list of rows.
    """
    with file.open() as stream:
        window = _Window(text.chunks(file, stream))
        first = window.peek()
        if first == "[":
            yield from _array_rows(file, window, _Decoder(columns))
            return
    if file.kind == "json" and first == "{":
        _refuse_spread_object(file, columns)
    elif file.kind == "json" and first:
        raise DataError(f"{file.name}: a JSON file of rows begins with '[' (or '{{' on every line), not with {first!r}")
    rows = _line_rows(file, _Decoder(columns))
    head = list(islice(rows, 2))
    if len(head) == 1 and head[0].data is not None and not head[0].data.keys() & columns:
        _refuse_wrapped(file, [key for key, value in head[0].data.items() if _is_list_of_objects(value)])
    yield from chain(head, rows)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _refuse_wrapped(file: DataFile, keys: Sequence[str]) -> None:
    """For a file that is one object, with the rows in a list under one of these keys."""
    if len(keys) == 1:
        raise DataError(
            f"{file.name}: the top level is an object with the rows under its key {keys[0]!r}, and a file of rows is "
            f"the list alone -> save that list as the file"
        )
    if keys:
        raise DataError(
            f"{file.name}: the top level is an object with lists of rows under the keys "
            f"{', '.join(map(repr, keys))}, and a file of rows is one list -> save each list as a file"
        )


def _refuse_spread_object(file: DataFile, columns: Collection[str]) -> None:
    """A .json file with one object per line is fine; one object over several lines is not a list of rows."""
    with file.open() as stream:
        line = next(line for line in text.lines(file, stream) if line.strip())
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        with file.open() as stream:
            window = _Window(text.chunks(file, stream))
            _refuse_wrapped(file, [key for key in _keys_of_rows(window) if key not in columns])
        raise DataError(
            f"{file.name}: the top level is an object, not a list of rows -> write [ {{...}}, {{...}} ], "
            f"or one object a line (the first line alone is not JSON: {error.msg})"
        ) from error
    except (ValueError, RecursionError):
        return  # the reader refuses this row, with its place


def _keys_of_rows(window: "_Window") -> Iterator[str]:
    """The keys of the object at the top level whose values are lists of objects, as far as it is valid JSON."""
    mark = window.peek()
    while mark in ("{", ","):
        window.skip(1)
        if window.peek() != '"':
            return
        try:
            key = window.value()
            if window.peek() != ":":
                return
            window.skip(1)
            window.peek()
            if _is_list_of_objects(window.value()):
                yield key
        except (ValueError, RecursionError):
            return
        mark = window.peek()


def _line_rows(file: DataFile, decoder: _Decoder) -> Iterator[Row]:
    with file.open() as stream:
        number = 0
        for line_number, line in enumerate(text.lines(file, stream), start=1):
            line = line.strip(" \t\r\n")
            if line:
                number += 1
                data, refusal = _parse_line(line, decoder)
                yield Row(file.name, number, data, refusal, line_number)


def _parse_line(line: str, decoder: _Decoder) -> tuple[dict[str, Any] | None, RowError | None]:
    try:
        value = decoder.decode(line)
    except json.JSONDecodeError as error:
        return None, RowError(f"not JSON: {error.msg} (column {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        return None, _refusal(error)
    return _checked(value, decoder, _SURROGATE.search(line) is not None)


def _refusal(error: ValueError | RecursionError) -> RowError:
    if isinstance(error, RecursionError):
        return RowError("the JSON is nested too deep to be read")
    return error if isinstance(error, _RepeatedKey) else RowError("a number has too many digits")


def _checked(
    value: Any, decoder: _Decoder, has_surrogate_escape: bool
) -> tuple[dict[str, Any] | None, RowError | None]:
    """(row, None) or (None, why it cannot be used)."""
    try:
        return _of_json(value, decoder, has_surrogate_escape)
    except RecursionError as error:  # reading it took fewer frames
        return None, _refusal(error)


def _of_json(
    value: Any, decoder: _Decoder, has_surrogate_escape: bool
) -> tuple[dict[str, Any] | None, RowError | None]:
    if not isinstance(value, dict):
        shown = json.dumps(value)[:_SHOWN]
        return None, RowError(f"a row is an object, not {shown}", shown)
    if has_surrogate_escape:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return None, RowError(f"holds half of a surrogate pair ({half}), which is not a character", half)
    if decoder.found_odd:
        decoder.found_odd = False
        try:
            for name in decoder.columns or value:
                _refuse_odd_numbers(value.get(name), name)
        except RowError as refusal:
            return None, refusal
    return value, None


def _refuse_odd_numbers(value: Any, place: str) -> None:
    """Refuse NaN and infinity inside lists and objects, which may become JSON text. Python reads and writes them."""
    if isinstance(value, (dict, list)):
        for name, member in value.items() if isinstance(value, dict) else enumerate(value):
            inner = f"{place}.{name}" if isinstance(value, dict) else f"{place}[{name}]"
            if isinstance(member, float) and not math.isfinite(member):
                raise RowError(f"{member} has no form in JSON: {inner}", inner)
            _refuse_odd_numbers(member, inner)


def _array_rows(file: DataFile, window: "_Window", decoder: _Decoder) -> Iterator[Row]:
    window.skip(1)
    number = 0
    mark = window.peek()
    while mark != "]":
        number += 1
        data, refusal = _array_value(file, window, number, decoder)
        yield Row(file.name, number, data, refusal)
        mark = window.peek()
        if mark == ",":
            window.skip(1)
            mark = window.peek()
            if mark == "]":
                raise DataError(f"{file.name}: {window.place()}: there is a comma after the last row ({number})")
        elif mark != "]":
            if not mark:
                raise _cut_off(file, number + 1, window)
            what = f"',' or ']' is expected after row {number}, not {mark!r}"
            raise DataError(f"{file.name}: {window.place()}: {what}")
    window.skip(1)
    if window.peek():
        raise DataError(f"{file.name}: {window.place()}: text after the end of the list of rows")


def _array_value(
    file: DataFile, window: "_Window", number: int, strict: _Decoder
) -> tuple[dict[str, Any] | None, RowError | None]:
    """The value at the position of the window, which moves past it."""
    refusal: RowError | None = None
    decoder: json.JSONDecoder = strict
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            offset = error.pos - window.position
            is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(window.text.rstrip())
            if (is_cut or error.pos >= len(window.text) - _CUT_MARGIN) and window.more():
                continue
            if is_cut:
                raise _cut_off(file, number, window) from error
            window.skip(offset)
            raise DataError(f"{file.name}: {window.place()}: row {number} is not JSON: {error.msg}") from error
        except RecursionError as error:
            raise DataError(f"{file.name}: {window.place()}: row {number} is nested too deep to be read") from error
        except ValueError as error:
            refusal, decoder = _refusal(error), _LENIENT
            continue
        num_characters = end - window.position
        # A number may continue after the window: `1` may be `12`, and `1e-` reads as 1 until a digit follows.
        if end + len("e-") >= len(window.text) and window.more():
            continue
        has_surrogate_escape = window.search(_SURROGATE, num_characters)
        window.skip(num_characters)
        return (None, refusal) if refusal else _checked(value, strict, has_surrogate_escape)


def _cut_off(file: DataFile, number: int, window: "_Window") -> DataError:
    return DataError(
        f"{file.name}: {window.place()}: the file ends in or before row {number}, without the closing ']' "
        f"-> it was cut off; write or download it again"
    )


class _Window:
    """The part of the text in memory, and the position up to which it has been read."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._exhausted = False
        self._lines_before, self._columns_before = 0, 0
        self.text, self.position = "", 0

    def more(self) -> bool:
        """Double the unread text (by at least one piece). False at the end of the file."""
        rest = self.text[self.position :]
        self._forget(self.text[: self.position])
        taken, wanted = [rest], max(1, len(rest))
        while wanted > 0 and not self._exhausted:
            piece = next(self._pieces, "")
            self._exhausted = not piece
            taken.append(piece)
            wanted -= len(piece)
        self.text, self.position = "".join(taken), 0
        return len(self.text) > len(rest)

    def _forget(self, text: str) -> None:
        self._lines_before, self._columns_before = self._after(text)

    def _after(self, text: str) -> tuple[int, int]:
        num_lines = text.count("\n")
        columns = len(text) - text.rfind("\n") - 1 if num_lines else self._columns_before + len(text)
        return self._lines_before + num_lines, columns

    def place(self) -> str:
        num_lines, num_columns = self._after(self.text[: self.position])
        return f"line {num_lines + 1}, column {num_columns + 1}"

    def skip(self, num_characters: int) -> None:
        self.position += num_characters

    def search(self, pattern: re.Pattern[str], num_characters: int) -> bool:
        return pattern.search(self.text, self.position, self.position + num_characters) is not None

    def value(self) -> Any:
        """The JSON value at the position, which moves past it. Raises `ValueError` if there is none."""
        while True:
            try:
                found, end = _LENIENT.raw_decode(self.text, self.position)
            except json.JSONDecodeError:
                if not self.more():
                    raise
            else:
                if end < len(self.text) or not self.more():
                    self.position = end
                    return found

    def peek(self) -> str:
        """Move to the next character that is not white space and return it; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None  # the pattern matches the empty string
            self.position = match.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""
