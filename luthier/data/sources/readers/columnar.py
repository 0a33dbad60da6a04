"""Rows of parquet and arrow files, read batch by batch, and their column names, read from the schema."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.data.sources.readers import DataFile, Row, row_of
from luthier.data.sources.readers.table_values import rows_of

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000


def read_columnar(
    file: DataFile, columns: Collection[str] | None = None, *, media: Collection[str] = ()
) -> Iterator[Row]:
    """Rows of a parquet or arrow file with these columns (None: all), see `rows_of`. Raises `DataError`."""
    number = 0
    with _opened(file, columns) as (_, batches):
        for batch in batches:
            for row in rows_of(batch, columns, media=media):
                number += 1
                yield row_of(file.name, number, row)


def schema_names(file: DataFile) -> list[str]:
    """Column names, from the footer or the schema message. Raises `DataError`."""
    with _opened(file, None) as (schema, _):
        return list(schema.names)


@contextmanager
def _opened(
    file: DataFile, columns: Collection[str] | None
) -> "Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]]":
    import pyarrow

    try:
        with file.open() as stream:
            schema, batches = _parquet(stream, columns) if file.kind == "parquet" else _arrow(stream)
            for name in schema.names:
                if schema.names.count(name) > 1:
                    raise DataError(f"{file.name}: the column {name!r} appears twice in the schema")
            yield schema, batches
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: not a readable {file.kind} file: {error}") from error


def _parquet(stream: Any, columns: Collection[str] | None) -> "tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]":
    from pyarrow import parquet

    table = parquet.ParquetFile(stream)
    schema = table.schema_arrow
    known = None if columns is None else [name for name in schema.names if name in columns]
    return schema, table.iter_batches(BATCH_ROWS, columns=known)


def _arrow(stream: Any) -> "tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]":
    """Reads both Arrow layouts: `datasets` writes streams, other tools random-access files."""
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if not is_file:
        reader = ipc.open_stream(stream)
        return reader.schema, iter(reader)
    table = ipc.open_file(stream)
    return table.schema, (table.get_batch(index) for index in range(table.num_record_batches))
