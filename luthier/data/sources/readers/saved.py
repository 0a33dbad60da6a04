"""Folders that `save_to_disk` of the library `datasets` wrote: which of their files hold the rows.

A saved Dataset is a folder with `state.json`, which names its Arrow files. A saved DatasetDict is a folder with
`dataset_dict.json`, which names its splits; each split is a folder with a saved Dataset.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from luthier.core.errors import DataError
from luthier.data.sources.readers import DataFile

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"


def folder_of_split(folder: str, split: str, read: Callable[[str], bytes | None]) -> str:
    """The folder of a split if this is a saved DatasetDict, else the folder itself. Raises `DataError`.

    `read` gives the bytes of a file, None if it does not exist.
    """
    path = f"{folder}/{SPLITS_FILE}"
    text = read(path)
    if text is None:
        return folder
    names = _names(path, text, "splits")
    if split not in names:
        shown = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{folder}: holds no split {split!r} -> give one of its splits as `split` ({shown})")
    return f"{folder}/{split}"


def holds_splits(folder: str) -> bool:
    """Whether this is the folder of a saved DatasetDict."""
    return os.path.isfile(os.path.join(folder, SPLITS_FILE))


def saved_files(files: Sequence[DataFile]) -> list[DataFile]:
    """Of the files of a folder those with rows, if it is a saved Dataset; else all. Raises `DataError`.

    The library leaves its own caches in such a folder, which are Arrow files too.
    """
    by_name = {os.path.basename(file.name): file for file in files}
    state = by_name.get(STATE_FILE)
    if state is None or not any(file.kind == "arrow" for file in files):
        return list(files)
    with state.open() as stream:
        names = _names(state.name, stream.read(), "_data_files")
    absent = [name for name in names if name not in by_name]
    if absent:
        raise DataError(f"{state.name}: names {absent[0]!r}, which is not there -> save or download the dataset again")
    return [by_name[name] for name in names]


def _names(path: str, text: bytes, key: str) -> list[str]:
    try:
        items: Any = json.loads(text)[key]
        return [item if isinstance(item, str) else item["filename"] for item in items]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: names no {key!r}, as `save_to_disk` writes them -> save the dataset again") from error
