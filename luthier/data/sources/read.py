"""From a description to rows: finds the files, picks the reader, and applies `num_samples` and `max_samples`.

Rows are read one by one, each with its place. A row that cannot be used has a reason instead of data. A dataset without
any row is a `DataError`. Nothing heavy is imported for json, jsonl, csv and txt.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import IO

from luthier.config.keys.hubs import NO_TOKENS, HubTokens
from luthier.core.errors import DataError
from luthier.core.registry import did_you_mean
from luthier.data.mix import sample_rows
from luthier.data.sources.dataset_info import DatasetSpec
from luthier.data.sources.readers import DataFile, Row
from luthier.data.sources.readers.columnar import read_columnar, schema_names
from luthier.data.sources.readers.compressed import COMPRESSIONS, TEXT_KINDS, data_file
from luthier.data.sources.readers.json_rows import read_json
from luthier.data.sources.readers.plain import csv_column_names, read_csv, read_txt
from luthier.data.sources.readers.saved import folder_of_split, saved_files

TABLES = ("parquet", "arrow")
KINDS = ("json", "jsonl", "csv", *TABLES, "txt")
"""Extensions of files with rows. Text may also be compressed: `a.jsonl.gz`."""
_HUBS = ("hf_hub", "ms_hub", "om_hub")
_SAME_KIND = {"jsonl": "json"}


def read_rows(
    spec: DatasetSpec,
    *,
    seed: int,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    tokens: HubTokens = NO_TOKENS,
    streams: bool = False,
) -> Iterator[Row]:
    """Rows in file order, or with `num_samples` a random sample in random order; at most `max_samples`.

    `cache_dir` and `tokens` are for hub repositories; `streams` reads them without downloading them first. Raises
    `DataError` for a source without rows and for a truncated file.
    """
    all_rows = partial(every_row, spec, cache_dir, tokens, streams=streams)
    rows = all_rows() if spec.num_samples is None else _sampled(all_rows, spec.num_samples, seed, max_samples)
    return islice(rows, None if max_samples is None else min(max_samples, sys.maxsize))


def data_files(spec: DatasetSpec) -> list[DataFile]:
    """The files of a local or cloud dataset, in order. Raises `DataError`; files are not opened."""
    if spec.source.kind == "cloud":
        from luthier.data.sources.readers.remote import cloud_files  # its imports would slow down every command

        found = cloud_files(spec)
    else:
        found = [data_file(path, partial(_opened, path)) for path in _local_paths(spec)]
    files = saved_files(found)
    for file in files:
        _require_known_kind(spec, file)
    kinds_found = {_SAME_KIND.get(file.kind, file.kind) for file in files}
    if len(kinds_found) > 1:
        raise DataError(
            f"dataset {spec.name!r}: {spec.source.location} holds files of several kinds "
            f"({', '.join(sorted(kinds_found))}) -> give each kind its own folder and description"
        )
    return files


def local_files(spec: DatasetSpec) -> dict[str, tuple[int, int]]:
    """File -> (size, modification time) of a local dataset; empty for others. Raises `DataError`."""
    if spec.source.kind in ("cloud", *_HUBS):
        return {}
    found = {file.name: os.stat(file.name) for file in data_files(spec)}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in found.items()}


def rows_in(file: DataFile, spec: DatasetSpec) -> Iterator[Row]:
    """The rows of one file; of a table with the columns that the description names. Raises `DataError`."""
    if file.kind in TABLES:
        return read_columnar(file, spec.column_names, media=spec.columns.media)
    if file.kind in ("json", "jsonl"):
        return read_json(file, spec.column_names)
    return (read_csv if file.kind == "csv" else read_txt)(file)


def column_names(file: DataFile) -> list[str] | None:
    """The columns in the header or schema of a table; None for kinds whose rows name their own."""
    if file.kind in TABLES:
        return schema_names(file)
    if file.kind == "csv":
        return csv_column_names(file)
    return ["text"] if file.kind == "txt" else None


def every_row(spec: DatasetSpec, cache_dir: str | None, tokens: HubTokens, *, streams: bool = False) -> Iterator[Row]:
    """All rows of the source, in order. Raises `DataError`."""
    empty = True
    if spec.source.kind in _HUBS:
        from luthier.data.sources.readers.remote import read_hub  # its imports would slow down every command

        for row in read_hub(spec, cache_dir=cache_dir, tokens=tokens, streams=streams):
            empty = False
            yield row
    else:
        for file in data_files(spec):
            for row in rows_in(file, spec):
                empty = False
                yield row
    if empty:
        raise DataError(f"dataset {spec.name!r}: {spec.source.location} holds no rows")


def _sampled(
    all_rows: Callable[[], Iterable[Row]], num_samples: int, seed: int, max_samples: int | None
) -> Iterator[Row]:
    """Two passes over the source: one counts the rows, one keeps the sample. Memory depends on the sample only."""
    num_rows = sum(1 for _ in all_rows())
    order = sample_rows(num_rows, num_samples, seed)[:max_samples].tolist()
    chosen = set(order)
    kept = {index: row for index, row in enumerate(all_rows()) if index in chosen}
    yield from (kept[index] for index in order)


def _local_paths(spec: DatasetSpec) -> list[str]:
    location = spec.source.location
    if os.path.isfile(location):
        return [location]
    if not os.path.isdir(location):
        raise DataError(f"dataset {spec.name!r}: {location}: {_why_absent(location)}")
    location = folder_of_split(location, spec.split, _bytes_of)
    names = sorted(name for name in os.listdir(location) if not name.startswith("."))
    if not names:
        raise DataError(f"dataset {spec.name!r}: the folder {location} is empty")
    paths = [os.path.join(location, name) for name in names]
    for path in paths:
        if os.path.isdir(path):
            raise DataError(
                f"dataset {spec.name!r}: {location} holds a folder, {os.path.basename(path)!r}, and not only files"
            )
    return paths


def _bytes_of(path: str) -> bytes | None:
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as stream:
        return stream.read()


def _why_absent(location: str) -> str:
    """(reason -> remedy) for a path that does not exist."""
    folder, name = os.path.split(location)
    siblings = sorted({*os.listdir(folder or ".")} - {"dataset_info.json"}) if os.path.isdir(folder or ".") else None
    hint = did_you_mean(name, siblings or (), repr) or "correct `file_name`, or put the file there"
    return f"{'no such file' if siblings is not None else f'there is no folder {folder}'} -> {hint}"


def _require_known_kind(spec: DatasetSpec, file: DataFile) -> None:
    if file.kind in KINDS:
        return
    remedy = ""
    if file.kind.endswith((*COMPRESSIONS, "zip", "7z", "tar", "tgz")):
        remedy = f" -> unpack it; of compressed files only {', '.join(TEXT_KINDS)} are read"
    raise DataError(
        f"dataset {spec.name!r}: {file.name}: unknown kind of file {file.kind!r} (one of {', '.join(KINDS)}){remedy}"
    )


def _opened(path: str) -> IO[bytes]:
    try:
        stream = open(path, "rb")  # noqa: SIM115  # the reader closes it
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if os.fstat(stream.fileno()).st_size == 0:
        stream.close()
        raise DataError(f"{path}: the file is empty")
    return stream
