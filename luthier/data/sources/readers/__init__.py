"""The readers: each turns one kind of file into rows with their place. `luthier.data.sources.read` picks one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from luthier.core.errors import RowError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset. Exactly one of `data` and `refusal` is given."""

    file: str
    number: int
    """1-based, counted within its file."""
    data: Mapping[str, Any] | None = None
    refusal: RowError | None = None
    """Why the row cannot be used."""
    line: int | None = None
    """1-based line in the file, where rows are lines."""

    def usable(self) -> Mapping[str, Any]:
        """The data. Raises `RowError` with the reason of a row that has none."""
        if self.data is None:
            assert self.refusal is not None, "one of the two is given"
            raise self.refusal
        return self.data

    @property
    def reason(self) -> str:
        """The text of `refusal`; empty for a row with data."""
        return "" if self.refusal is None else str(self.refusal)

    @property
    def place(self) -> str:
        line = f" (line {self.line})" if self.line not in (None, self.number) else ""
        return f"{self.file}, row {self.number}{line}"


def row_of(file: str, number: int, found: Mapping[str, Any] | RowError) -> Row:
    """The row with this data, or the one that cannot be used."""
    return Row(file, number, refusal=found) if isinstance(found, RowError) else Row(file, number, found)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A local or cloud file; readers see only its bytes."""

    name: str
    """The name in messages."""
    kind: str
    """The extension: json, jsonl, csv, parquet, arrow or txt; without that of a compression."""
    open: Callable[[], IO[bytes]]
    """Opens its bytes, decompressed."""
