"""The row plan of a training method: which examples it takes, and which token sequences they become.

Each file of `luthier.data.plans` is one. `luthier.data.rows.columns` explains the parts and columns of rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from luthier.data.rows.columns import IDS, LABELS, NUMBER, WEIGHTS, Column, columns_of_part
from luthier.data.rows.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.media.expand import Seen
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.labels import Encoded
    from luthier.data.rows.tokenize import Written


class Packer(Protocol):
    """Makes other rows of all tokenized rows. Its `repr` is part of the cache key."""

    columns: ClassVar[tuple[Column, ...]]
    cuts_rows: ClassVar[bool]
    """Whether it cuts rows itself, so that they need not be truncated to `cutoff_len` before."""
    is_optional: ClassVar[bool]
    """Whether the training method can also learn from rows that have not been packed."""

    @property
    def size_tokens(self) -> int:
        """Most tokens of a packed row."""
        ...

    def join(self, rows: Table) -> "Iterator[Sequence[pa.ListArray]]":
        """Batches of packed rows, one array per column."""
        ...


class Weigh(Protocol):
    """Labels the rows of an example whose messages carry `loss`."""

    def __call__(
        self,
        example: Any,
        written: "Sequence[Written]",
        turns: "Sequence[list[TurnIds]]",
        encoding: "Encoding",
        settings: "RowSettings",
        seen: "Seen | None" = None,
    ) -> "list[Encoded]": ...


def no_packer(run: "TrainRun", encoding: "Encoding") -> None:
    """Rows stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """The keys of a training method that decide its rows.

    A plan sees no other key of the method, so no other key is part of the cache key: the same tokenized rows serve
    another loss.
    """

    train_on_prompt: bool = False
    """Whether prompts are targets as well as answers."""
    mask_history: bool = False
    """Whether the last answer alone is a target."""
    own_answers: bool = False
    """Whether the model also trains on answers that it writes itself, so that every row is a prompt with one answer."""


def no_settings(method: Any) -> RowSettings:
    return RowSettings()


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """From an example to rows. It is part of a `Stage`."""

    name: str
    """Part of the cache key: stages with the same plan share their tokenized rows."""
    examples: tuple[type, ...]
    """The example types it takes; a row that gives another is dropped with the reason."""
    reads_chat: bool = True
    """Whether rows are conversations, so that a chat format is needed."""
    has_targets: bool = True
    """Whether every part must have a target; else a row may be a prompt alone."""
    parts: tuple[str, ...] = ("",)
    """The prefix of the columns of each part."""
    tags: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    """Column -> the whole number that an example has there, beside its tokens."""
    one_sided: "Callable[[Mapping[str, Counter[int]]], tuple[str, str] | None] | None" = None
    """(tag -> how many training rows have each number) -> (what is missing among them, remedy), if anything is."""
    settings: Callable[[Any], RowSettings] = no_settings
    """(the keys of the method) -> those that decide its rows."""
    write: "Callable[[Any, Encoding, RowSettings], Sequence[tuple[Written, ...]]]"
    """(example, encoding, settings) -> rows to tokenize, each with all its parts: one row, unless a chat template shows
    answers after other histories.

    Raises `RowError` for an example that cannot be used."""
    label: "Callable[[Sequence[list[TurnIds]], Encoding, RowSettings], tuple[Encoded, ...]]"
    """(turns of each part, encoding, settings) -> the parts with their targets, within `cutoff_len`."""
    weigh: "Weigh | None" = None
    """Only for rows of one part. None: every answer counts in full."""
    packer: "Callable[[TrainRun, Encoding], Packer | None]" = no_packer
    """Makes other rows of all tokenized rows: the blocks of pt, the packs of sft, the mismatched pairs of kto."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of a row before the packer has seen it."""
        kinds = (IDS, LABELS, WEIGHTS) if self.weigh is not None else (IDS, LABELS)
        tags = (Column(name, NUMBER) for name in self.tags)
        return (*(column for part in self.parts for column in columns_of_part(part, *kinds)), *tags)
