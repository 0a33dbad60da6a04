"""The first rows of datasets as they stand in their files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from luthier.data.sources.catalog import load_catalog
from luthier.data.sources.read import read_rows
from luthier.data.sources.readers import Row

MAX_CHARS = 20_000
"""Of a row more is not shown."""


@dataclass(frozen=True, slots=True)
class RawRow:
    place: str
    """File and number of the row."""
    text: str
    """The row as JSON; the reason for one that cannot be used."""
    is_usable: bool


def raw_rows(dataset_dir: str, names: Sequence[str], num_rows: int) -> list[RawRow]:
    """The first rows of these datasets, one dataset after another, as training reads them with `max_samples`.

    Raises `DataError` for a dataset that is not described or cannot be read.
    """
    catalog = load_catalog(dataset_dir)
    rows = (read_rows(catalog.get(name), seed=0, max_samples=num_rows) for name in names)
    return [_raw_row(row) for row in islice(chain.from_iterable(rows), num_rows)]


def _raw_row(row: Row) -> RawRow:
    if row.data is None:
        return RawRow(row.place, row.reason, is_usable=False)
    text = json.dumps(row.data, ensure_ascii=False, indent=2, default=str)
    return RawRow(row.place, text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} …", is_usable=True)
