"""What a check of the doctor is. Each other file in this folder is one; its file name is the name of its findings.

A check looks at one row at a time. What can be seen only beside other rows (twins, near twins) is noted on the row by
`luthier.inspection.examination` before the checks see it.
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
"""error: a row is lost, the run stops, or an evaluation is worth nothing. warning: it is learned, and maybe should not
be. info: good to know."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands."""

    file: str
    row: int
    """1-based, counted within its file."""
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
    """Why the row cannot be used, if it cannot."""
    rows: list[tuple[Encoded, ...]] = field(default_factory=list)
    """What training sees of it, cut to `cutoff_len`: rows, each with all its parts."""
    duplicates: Mapping[Split, Place] = field(default_factory=dict)
    """The first other row of each split that holds the very same."""
    near: Mapping[Split, tuple[Place, float]] = field(default_factory=dict)
    """A row of each split that says nearly the same, and how much of the two is the same (0..1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """What of the run the checks go by."""

    on_overlong: str
    cutoff_len: int | None
    has_targets: bool = True
    """Whether rows hold what is learned; false where the model answers their prompts itself."""
    splits_evaluation_off: bool
    """`val_size` is given, so that training and evaluation rows come from the same datasets."""
    split_special_tokens: bool
    special_words: re.Pattern[str]
    """Matches every text that the tokenizer reads as a special token."""
    answer_words: str
    """What the chat format lets answers contain although it may be special tokens: around thoughts and calls."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one row (or of a whole dataset, if `place` is None)."""

    check: str
    severity: Severity
    dataset: str
    split: Split
    place: Place | None
    what: str
    remedy: str
    other: Place | None = None
    """The row that this one is compared with."""

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
