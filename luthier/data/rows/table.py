"""Rows of lists of numbers in an Arrow table, memory-mapped from a file: by number, by slice, by column.

A subset or another order is an index over the same memory. Not `datasets.Dataset`: that library imports pandas, which
takes longer than reading the rows of most runs.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from operator import index as as_index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPE_OF = {**{name: name for name in _INTEGERS}, "halffloat": "float16", "float": "float32", "double": "float64"}
"""Type of Arrow -> dtype of numpy, for numbers that are stored as numpy stores them."""


def to_numpy(array: "pa.Array") -> "np.ndarray":
    """(N,) the numbers of an array without nulls, where Arrow has them. `pa.Array.to_numpy` imports pandas."""
    import numpy as np

    dtype = np.dtype(_DTYPE_OF[str(array.type)])
    memory = array.buffers()[1]
    if memory is None:
        return np.zeros(0, dtype)
    return np.frombuffer(memory, dtype, len(array), array.offset * dtype.itemsize)


def from_numpy(values: "np.ndarray") -> "pa.Array":
    """The numbers (N,) as an array, in the same memory. `pa.array` imports pandas."""
    import numpy as np
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


class Table:
    """R rows. `index` (R,) chooses rows of `arrow`; None is all of them, in order."""

    def __init__(
        self, arrow: "pa.Table", index: "np.ndarray | None" = None, files: tuple[Path, ...] | None = None
    ) -> None:
        """`files`: those that hold the rows of `arrow`, one after the other, if there are any."""
        self.whole, self.index, self.files = arrow, index, files

    @classmethod
    def of_files(cls, files: tuple[Path, ...], names: Sequence[str], index: "np.ndarray | None" = None) -> Self:
        """The rows of all files, memory-mapped."""
        import pyarrow as pa

        parts = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files]
        arrow = pa.concat_tables(part.select(list(names)) if names else part for part in parts)
        return cls(arrow, index, files)

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is sent the rows maps their files itself."""
        if self.files is None:
            return Table, (self.whole, self.index)
        return Table.of_files, (self.files, self.column_names, self.index)

    def __len__(self) -> int:
        return self.whole.num_rows if self.index is None else len(self.index)

    @property
    def column_names(self) -> list[str]:
        return list(self.whole.column_names)

    def select(self, index: "Sequence[int] | np.ndarray") -> "Table":
        """The rows with these numbers, in this order."""
        import numpy as np

        chosen = np.asarray(index, np.int64)
        return Table(self.whole, chosen if self.index is None else self.index[chosen], self.files)

    def select_columns(self, names: Sequence[str]) -> "Table":
        return Table(self.whole.select(list(names)), self.index, self.files)

    def arrow(self, start: int = 0, stop: int | None = None) -> "pa.Table":
        """Rows `start` to `stop`; a view of the file if rows are not reordered."""
        stop = len(self) if stop is None else stop
        if self.index is None:
            return self.whole.slice(start, stop - start)
        return self.whole.take(from_numpy(self.index[start:stop]))

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> dict[str, list[Any]]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: int | slice | str) -> Any:
        """A row (column -> list), several rows (column -> their lists), or a column (the lists of all rows)."""
        if isinstance(key, str):
            return self.select_columns([key]).arrow().column(key).to_pylist()
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            rows = self if step == 1 else self.select(range(start, stop, step))
            return (rows.arrow(start, max(start, stop)) if step == 1 else rows.arrow()).to_pydict()
        number = as_index(key)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        number %= len(self)
        return self._row(number if self.index is None else int(self.index[number]))

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """How a data loader of torch asks for a batch."""
        return [self[number] for number in numbers]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self)):
            yield self[number]

    def _row(self, place: int) -> dict[str, Any]:
        starts, batches = self._batches
        number = bisect_right(starts, place) - 1
        return {
            name: column.row(place - starts[number])
            for name, column in zip(self.whole.column_names, batches[number], strict=True)
        }

    @cached_property
    def _batches(self) -> "tuple[list[int], list[list[_Column]]]":
        """(the number of the first row of each batch, the columns of each batch)"""
        starts, batches, start = [], [], 0
        for batch in self.whole.to_batches():
            if batch.num_rows:
                starts.append(start)
                batches.append([_Column(column) for column in batch.columns])
                start += batch.num_rows
        return starts, batches


class _Column:
    """A column of a batch. The lists of rows are cut from one array of numbers where the column allows it."""

    def __init__(self, column: "pa.Array") -> None:
        import pyarrow as pa

        kind, self.column = column.type, column
        is_plain = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not column.null_count
        self.values: np.ndarray | None = None
        if is_plain and str(kind.value_type) in _DTYPE_OF and not column.values.null_count:
            self.values, self.offsets = to_numpy(column.values), to_numpy(column.offsets)

    def row(self, number: int) -> Any:
        if self.values is None:
            return self.column[number].as_py()
        return self.values[self.offsets[number] : self.offsets[number + 1]].tolist()


def joined(tables: Sequence[Table]) -> Table:
    """All rows of tables with equal columns, one table after the other."""
    import numpy as np
    import pyarrow as pa

    if len(tables) == 1:
        return tables[0]
    arrow = pa.concat_tables([table.whole for table in tables])
    files = [table.files for table in tables]
    paths = None if None in files else tuple(path for some in files if some is not None for path in some)
    if all(table.index is None for table in tables):
        return Table(arrow, None, paths)
    firsts = np.cumsum([0, *(table.whole.num_rows for table in tables)])
    index = [
        first + (np.arange(len(table)) if table.index is None else table.index)
        for first, table in zip(firsts, tables, strict=False)
    ]
    return Table(arrow, np.concatenate(index), paths)


def extended(table: Table, rows: Sequence[Mapping[str, Any]]) -> Table:
    """`table` with more rows at its end."""
    import pyarrow as pa

    return joined([table, Table(pa.Table.from_pylist([dict(row) for row in rows], schema=table.whole.schema))])
