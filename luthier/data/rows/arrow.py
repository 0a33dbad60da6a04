"""Tables of lists of numbers in Arrow files. They are written batch by batch and memory-mapped.

R rows in a batch, N values in all its rows. A column is its N concatenated values and the R lengths; there is no Python
object per token.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from luthier.data.rows.columns import IDS, Column, parts_of
from luthier.data.rows.table import Table, from_numpy, to_numpy

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

BATCH_ROWS = 1000
BATCH_NUMBERS = 1 << 22
"""A batch that holds so many ends before it has all its rows: a thousand books would fill the memory."""


class TableWriter:
    """Writes one file, a batch of rows at a time. A context manager; the file is complete after a normal exit."""

    def __init__(self, path: "Path | pa.NativeFile", columns: Sequence[Column]) -> None:
        import pyarrow as pa

        self.columns, self.num_rows = tuple(columns), 0
        self._pending: list[Sequence[Sequence[Any]]] = []
        self._num_pending = 0
        """The numbers in all lists of these rows."""
        self._file = pa.OSFile(str(path), "wb") if isinstance(path, Path) else path
        types = {column.name: pa.list_(getattr(pa, column.kind.dtype)()) for column in columns}
        self._stream = pa.ipc.new_stream(self._file, pa.schema(list(types.items())))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fault is None:
            self._flush()
        self._stream.close()
        self._file.close()

    def add(self, row: Sequence[Sequence[Any]]) -> None:
        """A row: one list per column."""
        self._pending.append(row)
        self._num_pending += sum(map(len, row))
        if len(self._pending) == BATCH_ROWS or self._num_pending >= BATCH_NUMBERS:
            self._flush()

    def add_arrays(self, columns: "Sequence[pa.ListArray]") -> None:
        import pyarrow as pa

        self._flush()
        self.num_rows += len(columns[0])
        self._stream.write_batch(pa.record_batch(list(columns), [column.name for column in self.columns]))

    def _flush(self) -> None:
        if self._pending:
            columns = [
                from_lists(lists, column.kind.dtype)
                for column, lists in zip(self.columns, zip(*self._pending, strict=True), strict=True)
            ]
            self._pending, self._num_pending = [], 0
            self.add_arrays(columns)


def table_at(path: Path) -> Table:
    """The rows of a file, memory-mapped."""
    return Table.of_files((path,), ())


def table_of(rows: Iterable[Sequence[Sequence[float]]], columns: Sequence[Column]) -> Table:
    """A table of a few rows, in memory."""
    import pyarrow as pa

    memory = pa.BufferOutputStream()
    with TableWriter(memory, columns) as writer:
        for row in rows:
            writer.add(row)
    return Table(pa.ipc.open_stream(memory.getvalue()).read_all())


def list_array(values: "np.ndarray", lengths: "np.ndarray") -> "pa.ListArray":
    """values: (N,) integers or floats, lengths: (R,) with sum N."""
    import numpy as np
    import pyarrow as pa

    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    narrow = np.float32 if values.dtype.kind == "f" else np.int32
    return pa.ListArray.from_arrays(from_numpy(offsets), from_numpy(values.astype(narrow, copy=False)))


def batches_of(rows: Table, column: str) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """(values (N,), lengths (R,)) of a column, a batch at a time."""
    import numpy as np

    chosen = rows.select_columns([column])
    ends = np.cumsum(_lengths_in(rows, column))
    start = 0
    while start < len(rows):
        full = (ends[start - 1] if start else 0) + BATCH_NUMBERS
        end = min(start + BATCH_ROWS, int(np.searchsorted(ends, full)) + 1, len(rows))
        yield flat(chosen.arrow(start, end).column(column))
        start = end


def flat(column: "pa.ChunkedArray") -> "tuple[np.ndarray, np.ndarray]":
    """(values (N,), lengths (R,)) of a column of lists."""
    import numpy as np

    chunks = column.chunks or [column.combine_chunks()]
    return np.concatenate([to_numpy(chunk.flatten()) for chunk in chunks]), _lengths(column)


def _lengths(column: "pa.ChunkedArray") -> "np.ndarray":
    """(R,) of the lists in a column, whose values are not read."""
    import numpy as np

    return np.concatenate([np.diff(to_numpy(chunk.offsets)) for chunk in column.chunks or [column.combine_chunks()]])


def row_lengths(rows: Table) -> "np.ndarray":
    """(rows,) tokens of every row of a table, in all its parts."""
    import numpy as np

    found = np.zeros(len(rows), np.int64)
    for part in parts_of(rows.column_names):
        found += _lengths_in(rows, part + IDS.name)
    return found


def _lengths_in(rows: Table, column: str) -> "np.ndarray":
    """(rows,) of the lists in a column of a table."""
    found = _lengths(rows.whole.column(column))
    return found if rows.index is None else found[rows.index]


def from_lists(lists: Sequence[Sequence[Any]], dtype: str = "int32") -> "pa.ListArray":
    """A column of lists of numbers, or of texts."""
    import numpy as np
    import pyarrow as pa

    if dtype == "string":
        return pa.array(lists, pa.list_(pa.string()))
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return list_array(np.fromiter(chain.from_iterable(lists), dtype, int(lengths.sum())), lengths)
