"""The folder `tokenized_path`: tokenized rows in the format of `datasets`, to be copied to other machines.

A `DatasetDict` of `train` and `validation` (or `validation_<dataset>` for each), `prompts` for generation, the ledger,
and the record of what made the rows (`luthier.data.cache.provenance`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.core.files import save_folder_atomically
from luthier.data.cache.provenance import MADE_BY_FILE
from luthier.data.ledger import LEDGER_FILE, Ledger, ledger_of
from luthier.data.rows.columns import IMAGES, LENGTHS, SEQUENCE, Column, with_media
from luthier.data.rows.table import Table

if TYPE_CHECKING:
    import datasets

EVAL, PROMPTS = "validation", "prompts"

Sets = Mapping[str, Table]


def save_tokenized(
    folder: Path,
    train: Table | None,
    evals: Sets,
    prompts: Sets,
    ledger: Ledger,
    record: Mapping[str, Any],
) -> None:
    """`record`: of what made the rows.

    Raises `OutputError` or `RunFailed` if the folder cannot be written; no partial folder is left.
    """
    import datasets

    sets = {"train": train} if train is not None else {}
    sets |= {_split(EVAL, name): rows for name, rows in evals.items()}
    sets |= {_split(PROMPTS, name): rows for name, rows in prompts.items()}
    with save_folder_atomically(folder) as draft:
        datasets.DatasetDict({name: _dataset(rows) for name, rows in sets.items()}).save_to_disk(str(draft))
        (draft / LEDGER_FILE).write_text(json.dumps(ledger.to_json(), indent=2))
        (draft / MADE_BY_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def load_tokenized(
    folder: Path, columns: Sequence[Column], *, sees: bool = False
) -> tuple[Table | None, Sets, Sets, Ledger]:
    """(train, eval, prompts, ledger). `columns`: the columns that rows must have; `sees`: and those of images.

    Raises `DataError` for a folder with other contents.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as fault:
        raise DataError(f"tokenized_path: {folder} holds no tokenized rows ({fault}) -> name a new folder") from fault
    found = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    sets = {name: _table(rows) for name, rows in found.items()}
    wanted = {name: SEQUENCE if name.split("_")[0] == PROMPTS else tuple(columns) for name in sets}
    if sees:
        wanted = {name: with_media(own) for name, own in wanted.items()}
    elif any(IMAGES.name in table.column_names for table in sets.values()):
        raise DataError(f"tokenized_path: {folder} holds rows with images, and the model reads text only")
    rows = {name: _own_columns(folder, name, table, wanted[name]) for name, table in sets.items()}
    ledger = _ledger(folder) if (folder / LEDGER_FILE).is_file() else Ledger()
    ledger.samples = {name: len(table) for name, table in rows.items()}
    return rows.get("train"), _named(rows, EVAL), _named(rows, PROMPTS), ledger


def _dataset(rows: Table) -> "datasets.Dataset":
    import datasets

    whole = datasets.Dataset(datasets.table.InMemoryTable(rows.whole))
    return whole if rows.index is None else whole.select(rows.index)


def _table(rows: "datasets.Dataset") -> Table:
    index = rows._indices
    return Table(rows.data.table, None if index is None else index.column(0).to_numpy())


def _split(kind: str, name: str) -> str:
    return f"{kind}_{name}" if name else kind


def _named(rows: Sets, kind: str) -> Sets:
    return {
        name.removeprefix(kind).removeprefix("_"): table for name, table in rows.items() if name.split("_")[0] == kind
    }


def _own_columns(folder: Path, name: str, table: Table, wanted: tuple[Column, ...]) -> Table:
    found = table.column_names
    missing = [column.name for column in wanted if column.name not in found and not column.kind.is_optional]
    if missing:
        raise DataError(
            f"tokenized_path: {folder}: {name} has no column {' and '.join(missing)}, which this stage needs"
            " -> name a new folder"
        )
    is_packed = LENGTHS.name in found
    if "position_ids" in found and not is_packed:
        raise DataError(
            f"tokenized_path: {folder}: {name} was packed by another program, which does not say where samples begin"
            " -> name a new folder"
        )
    names = dict.fromkeys((*(column.name for column in wanted), LENGTHS.name))
    return table.select_columns([name for name in names if name in found])


def _ledger(folder: Path) -> Ledger:
    path = folder / LEDGER_FILE
    try:
        return ledger_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        reason = f"is damaged, or of another version ({type(fault).__name__}: {fault})"
        raise DataError(f"tokenized_path: {path}: {reason} -> remove this file, or name a new folder") from fault
