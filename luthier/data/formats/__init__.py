"""The dataset formats. Each other file in this folder is one; its file name is the value of `formatting`.

A format turns one row into one canonical example (`luthier.data.types`). Which example depends on the description:
`ranking` gives a Preference, a `kto_tag` column a Feedback, an answer a Dialogue, and a prompt alone a Prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.data.sources.dataset_info import DatasetSpec
from luthier.data.types import Example


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    read: Callable[[Mapping[str, Any], DatasetSpec], Example]
    """Raises `RowError` with the reason for a row that deviates from the format."""
    needs: tuple[str, ...]
    """Keys of `columns` without which no row can be read, as far as the description uses them."""
    ignores: tuple[str, ...]
    """Keys of `columns` that belong to other formats."""
    has_roles: bool
    """Whether rows are lists of messages whose roles `tags` names."""
