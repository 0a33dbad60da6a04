"""Remote rows: hub repositories through their client libraries, cloud files through fsspec."""

import importlib
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from luthier.config.keys.hubs import NO_TOKENS, HubTokens
from luthier.core.errors import DataError, InvalidInput, RowError
from luthier.core.versions import require
from luthier.data.sources.readers import DataFile, Row, row_of
from luthier.data.sources.readers.compressed import data_file
from luthier.data.sources.readers.saved import folder_of_split
from luthier.data.sources.readers.table_values import plain_row, rows_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from luthier.data.sources.dataset_info import DatasetSpec


@dataclass(frozen=True, slots=True)
class _Driver:
    """The library for a cloud protocol, its options for anonymous access, and its error class."""

    module: str
    anonymous: dict[str, Any]
    errors: str
    error: str


BATCH_ROWS = 100
"""Rows that are fetched at a time."""
_S3 = _Driver("s3fs", {"anon": True}, "botocore.exceptions", "BotoCoreError")
_GCS = _Driver("gcsfs", {"token": "anon"}, "gcsfs.retry", "HttpError")
_DRIVERS = {"s3": _S3, "gs": _GCS, "gcs": _GCS}


def read_hub(
    spec: "DatasetSpec", *, cache_dir: str | None, tokens: HubTokens = NO_TOKENS, streams: bool = False
) -> Iterator[Row]:
    """Rows of a hub repository. `streams`: they are downloaded while they are read.

    Raises `DataError` if it cannot be reached and `MissingExtra` without its library.
    """
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        load = _LOADERS[spec.source.kind](spec, streams)
        token = asdict(tokens)[spec.source.kind]
        for row in _rows(load(data_dir=spec.folder, split=spec.split, cache_dir=cache_dir, token=token), spec):
            number += 1
            yield row_of(spec.source.location, number, row)
    except InvalidInput:
        raise
    # Raised by the clients for a missing, private or unreachable repository, and for an unknown subset or split.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        where = f" after row {number}" if number else ""
        raise DataError(
            f"dataset {spec.name!r}: the hub repository {spec.source.location!r} cannot be loaded{where} "
            f"({first_line(error)}) -> check its name, `subset` and `split`, the network and the token, or download it "
            f"and give its files as `file_name`"
        ) from error


def _rows(loaded: Any, spec: "DatasetSpec") -> Iterator[dict[str, Any] | RowError]:
    """The rows of what a client gives. Those of the library `datasets` are taken as tables, undecoded."""
    import datasets

    media = spec.columns.media
    if isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        for table in loaded.with_format("arrow").iter(BATCH_ROWS):
            yield from rows_of(table, spec.column_names, media=media)
        return
    for row in loaded:
        try:
            yield plain_row(row, spec.column_names, media=media)
        except RowError as refusal:
            yield refusal


def _hugging_face(spec: "DatasetSpec", streams: bool) -> Callable[..., Any]:
    from datasets import load_dataset

    return partial(load_dataset, spec.source.location, spec.subset, **_streaming(streams, "streaming"))


def _modelscope(spec: "DatasetSpec", streams: bool) -> Callable[..., Any]:
    client = require("modelscope", "modelscope", f"dataset {spec.name!r} on ModelScope")

    def load(**words: Any) -> Any:
        loaded = client.MsDataset.load(
            spec.source.location, subset_name=spec.subset, **_streaming(streams, "use_streaming"), **words
        )
        return loaded.to_hf_dataset() if isinstance(loaded, client.MsDataset) else loaded

    return load


def _modelers(spec: "DatasetSpec", streams: bool) -> Callable[..., Any]:
    client = require("openmind", "openmind", f"dataset {spec.name!r} on Modelers")
    return partial(
        client.OmDataset.load_dataset, path=spec.source.location, name=spec.subset, **_streaming(streams, "streaming")
    )


def _streaming(streams: bool, word: str) -> dict[str, bool]:
    """The argument of a client that downloads rows while they are read."""
    return {word: True} if streams else {}


_LOADERS = {"hf_hub": _hugging_face, "ms_hub": _modelscope, "om_hub": _modelers}


def first_line(error: BaseException) -> str:
    """The first line of a client's error, whose text may be long, and the next one if it names what there is.

    What goes wrong while the library `datasets` reads the files is the cause of its error.
    """
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if more and "available" in more[0].lower() else first


def cloud_files(spec: "DatasetSpec") -> list[DataFile]:
    """The files at a cloud address. Anonymous access is tried first, then the credentials of the machine.

    Raises `DataError` if they cannot be listed and `MissingExtra` without the driver.
    """
    url = spec.source.location
    protocol = url.partition("://")[0]
    refusals: tuple[type[BaseException], ...] = (OSError, ValueError)
    accesses: list[dict[str, Any]] = [{}]
    if protocol in _DRIVERS:
        driver = _DRIVERS[protocol]
        require(driver.module, "cloud", f"dataset {spec.name!r} at {url}")
        refusals += (getattr(importlib.import_module(driver.errors), driver.error),)
        accesses.insert(0, driver.anonymous)
    from fsspec.core import url_to_fs

    reasons = []
    for options in accesses:
        try:
            system, path = url_to_fs(url, **options)
            return _listed(system, path, spec.split)
        except DataError:
            raise
        except refusals as error:
            reasons.append(first_line(error))
    raise DataError(
        f"dataset {spec.name!r}: {url} cannot be read ({'; '.join(dict.fromkeys(reasons))}) -> check the address, "
        f"the network and the credentials"
    )


def _listed(system: "AbstractFileSystem", path: str, split: str) -> list[DataFile]:
    if not system.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if system.isdir(path):
        path = folder_of_split(path, split, lambda name: system.cat_file(name) if system.exists(name) else None)
    paths = sorted(system.find(path)) if system.isdir(path) else [path]
    visible = [entry for entry in paths if not posixpath.basename(entry).startswith(".")]
    if not visible:
        raise FileNotFoundError(f"{path}: no file in this folder")
    return [data_file(entry, partial(_open, system, entry)) for entry in visible]


def _open(system: "AbstractFileSystem", path: str) -> IO[bytes]:
    return system.open(path, "rb")
