"""Rows of parquet and arrow files, read batch by batch, and their column names, read from the schema."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.data.sources.readers import DataFile, Row

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000


def read_columnar(file: DataFile) -> Iterator[Row]:
    """Rows of a parquet or arrow file. Raises `DataError`."""
    number = 0
    with _opened(file) as (_, batches):
        for batch in batches:
            for data in batch.to_pylist():
                number += 1
                yield Row(file.name, number, data)


def schema_names(file: DataFile) -> list[str]:
    """Column names, from the footer or the schema message. Raises `DataError`."""
    with _opened(file) as (schema, _):
        return list(schema.names)


@contextmanager
def _opened(file: DataFile) -> "Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]]":
    import pyarrow

    try:
        with file.open() as stream:
            yield _parquet(stream) if file.kind == "parquet" else _arrow(stream)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: not a readable {file.kind} file: {error}") from error


def _parquet(stream: Any) -> "tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]":
    from pyarrow import parquet

    table = parquet.ParquetFile(stream)
    return table.schema_arrow, table.iter_batches(BATCH_ROWS)


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
