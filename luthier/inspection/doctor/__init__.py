"""The checks of the doctor. Each other file in this folder is one; its file name is the name of its findings.

A check sees one row at a time. Duplicates and near duplicates are found by `luthier.inspection.examination` and stored
in the row before the checks see it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.core.errors import RowError
from luthier.data.rows.labels import Encoded
from luthier.data.types import Example

Split = Literal["train", "eval"]
Severity = Literal["error", "warning", "info"]
"""error: a row is dropped, the run stops, or an evaluation is invalid. warning: a row is used, and perhaps should not
be. info: good to know."""


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a row."""

    file: str
    row: int
    """Number within its file, from 1."""
    text: str
    """Both in words."""


@dataclass(slots=True)
class Sample:
    """One row of a dataset on its way to a check."""

    dataset: str
    split: Split
    place: Place
    example: Example | None = None
    refusal: RowError | None = None
    """Why the row cannot be used."""
    rows: list[tuple[Encoded, ...]] = field(default_factory=list)
    """The rows for training, truncated to `cutoff_len`, each with all its parts."""
    duplicates: Mapping[Split, Place] = field(default_factory=dict)
    """Split -> the first other row with the same content."""
    near: Mapping[Split, tuple[Place, float]] = field(default_factory=dict)
    """Split -> the most similar row, and its similarity (0 to 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """The settings of the run that checks need."""

    on_overlong: str
    cutoff_len: int | None
    has_targets: bool = True
    """Whether rows must have targets; false if the model answers the prompts itself."""
    splits_evaluation_off: bool
    """Whether `val_size` is set, so that training and evaluation rows come from the same datasets."""
    split_special_tokens: bool
    special_words: re.Pattern[str]
    """Matches all texts that the tokenizer reads as special tokens."""
    answer_words: str
    """Texts that answers may contain even if they are special tokens: the tags around thoughts and calls."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a row, or of a whole dataset if `place` is None."""

    check: str
    severity: Severity
    dataset: str
    split: Split
    place: Place | None
    what: str
    remedy: str
    other: Place | None = None
    """The other row of a comparison."""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"check": self.check, "severity": self.severity, "dataset": self.dataset}
        found |= {"split": self.split, "file": self.place.file if self.place else None}
        found |= {"rows": [self.place.row] if self.place else [], "what": self.what, "remedy": self.remedy}
        return found | ({"other": {"file": self.other.file, "row": self.other.row}} if self.other else {})


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    find: Callable[[Sample, CheckContext], Iterator[Finding]]


def finding(
    sample: Sample, check: str, severity: Severity, what: str, remedy: str, other: Place | None = None
) -> Finding:
    return Finding(check, severity, sample.dataset, sample.split, sample.place, what, remedy, other)
