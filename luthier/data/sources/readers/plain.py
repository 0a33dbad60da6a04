"""Rows of csv files (all cells are text, empty ones null) and txt files (each line is a row with the column `text`)."""

import csv
import sys
from collections.abc import Iterator

from luthier.core.errors import DataError, RowError
from luthier.data.sources.readers import DataFile, Row, text


def read_csv(file: DataFile) -> Iterator[Row]:
    """Rows after the header line: comma-separated, quoted as in RFC 4180. Raises `DataError`."""
    csv.field_size_limit(sys.maxsize)  # the default refuses cells over 128 KiB
    with file.open() as stream:
        table = csv.reader(text.lines(file, stream), strict=True)
        header = _header(file, table)
        number = 0
        while True:
            line = table.line_num + 1
            try:
                cells = next(table, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    reason = f"the file ends inside the quoted cell that begins in line {line}"
                    raise DataError(f"{file.name}: {reason} -> a closing quote is missing") from error
                number += 1
                yield Row(file.name, number, refusal=RowError(f"not CSV: {error}"), line=line)
                continue
            if cells is None:
                return
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                reason = f"has {len(cells)} cells where the header has {len(header)}"
                yield Row(file.name, number, refusal=RowError(reason), line=line)
            else:
                data = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                yield Row(file.name, number, data, line=line)


def csv_column_names(file: DataFile) -> list[str]:
    """Raises `DataError` if there is no readable header."""
    with file.open() as stream:
        return _header(file, csv.reader(text.lines(file, stream), strict=True))


def _header(file: DataFile, table: Iterator[list[str]]) -> list[str]:
    try:
        header = next((cells for cells in table if cells), [])
    except csv.Error as error:
        raise DataError(f"{file.name}: the header line is not CSV: {error}") from error
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{file.name}: the column {name!r} appears twice in the header")
    return header


def read_txt(file: DataFile) -> Iterator[Row]:
    """Lines that are not blank. Raises `DataError`."""
    with file.open() as stream:
        number = 0
        for line_number, line in enumerate(text.lines(file, stream), start=1):
            line = line.rstrip("\r\n")
            if line.strip():
                number += 1
                yield Row(file.name, number, {"text": line}, line=line_number)
