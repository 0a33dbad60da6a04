"""Calibration texts for quantization: random windows of equal length."""

import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.config.keys.hubs import HubTokens
from luthier.core.errors import DataError
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.data.sources.read import KINDS, column_names, data_files, every_row
from luthier.data.sources.readers.compressed import split_extensions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "export_quantization_dataset"


def read_texts(source: str, *, cache_dir: str | None = None, token: str | None = None) -> list[str]:
    """The column `text` of a file, of the files of a folder, or of the training part of a dataset of the hub.

    Raises `DataError` for a source that cannot be read, or whose rows have no text.
    """
    path = os.path.expanduser(source)
    if os.path.exists(path):
        found = Source("file", path)
    elif "://" in source:
        found = Source("cloud", source)
    elif split_extensions(path)[0] in KINDS or path.count("/") > 1:
        raise DataError(f"{KEY}: {source}: there is no such file -> correct the path, or name a dataset of the hub")
    else:
        found = Source("hf_hub", source)
    spec = DatasetSpec(name=KEY, source=found, columns=Columns(prompt="text"), columns_given=True)
    rows = [row.data for row in every_row(spec, cache_dir, HubTokens(hf_hub=token)) if row.data]
    texts = [text for row in rows if isinstance(text := row.get("text"), str) and text]
    if not texts:
        columns = ", ".join(sorted({name for row in rows for name in row} | _header(spec)))
        known = f" (its columns: {columns})" if columns else ""
        raise DataError(
            f"{KEY}: {source}: no row has a text in the column `text`{known} -> rename the column that holds the texts"
        )
    return texts


def _header(spec: DatasetSpec) -> set[str]:
    """The columns of a table, of whose rows only the texts are read; empty for a dataset of the hub."""
    files = data_files(spec) if spec.source.kind in ("file", "cloud") else []
    return set(column_names(files[0]) or ()) if files else set()


def windows(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, num_samples: int, num_tokens: int, seed: int = 0
) -> list[list[int]]:
    """`num_samples` pieces of exactly `num_tokens` tokens, from random places of texts in random order.

    A text gives a second piece only when all have given one. Raises `DataError` if none is long enough.
    """
    chance = random.Random(seed)
    found: list[list[int]] = []
    long_enough: list[list[int]] = []
    longest = 0

    def cut(ids: list[int]) -> None:
        start = chance.randint(0, len(ids) - num_tokens)
        found.append(ids[start : start + num_tokens])

    for index in chance.sample(range(len(texts)), len(texts)):
        if len(found) == num_samples:
            return found
        ids: list[int] = tokenizer(texts[index], verbose=False).input_ids
        longest = max(longest, len(ids))
        if len(ids) >= num_tokens:
            long_enough.append(ids)
            cut(ids)
    if not long_enough:
        raise DataError(
            f"{KEY}: none of its {len(texts):,} texts has {num_tokens:,} tokens; the longest has {longest:,}"
            f" -> set export_quantization_maxlen to {longest:,} or less, or give longer texts"
        )
    while len(found) < num_samples:
        cut(chance.choice(long_enough))
    return found
