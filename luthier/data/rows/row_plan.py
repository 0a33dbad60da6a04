"""What a row is for a training method: which examples it takes, and which token sequences they become.

A row has one sequence of tokens (pt, sft), or two that belong together (a better and a worse answer). Each is a *part*;
the columns of a part carry its prefix, e.g. `chosen_input_ids` and `chosen_labels`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.packing.best_fit import Packer
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.labels import Encoded
    from luthier.data.rows.tokenize import Written

SEQUENCE_COLUMNS = ("input_ids", "labels")
"""The columns of every part."""
WEIGHTS = "weights"
"""The column that says how much each token counts in the loss; empty if the learned tokens of a row count in full."""
SAMPLE_LENGTHS = "sample_lengths"
"""The column of packed rows that says how many tokens each of their samples has."""


def no_packer(run: "TrainRun", encoding: "Encoding") -> None:
    """Rows stay as they are."""


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """From an example to rows. It is part of a `Stage`."""

    examples: tuple[type, ...]
    """The example types it takes; a row that gives another is dropped with the reason."""
    reads_chat: bool = True
    """Whether rows are conversations, so that a chat format is needed."""
    has_targets: bool = True
    """Whether something of every part must be learned; else a row may be a prompt alone."""
    parts: tuple[str, ...] = ("",)
    """The prefix of the columns of each part."""
    tags: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    """Column -> the whole number that an example has there, beside its tokens."""
    write: "Callable[[Any, Encoding, Any], Sequence[tuple[Written, ...]]]"
    """(example, encoding, config) -> rows to tokenize, each with all its parts: one row, unless a chat template shows
    answers after other histories.

    Raises `RowError` for an example that cannot be used."""
    label: "Callable[[Sequence[list[TurnIds]], Encoding, Any], tuple[Encoded, ...]]"
    """(turns of each part, encoding, config) -> the parts: what is learned of them, within `cutoff_len`."""
    weigh: "Callable[[Any, Sequence[Written], Sequence[list[TurnIds]], Encoding, Any], list[Encoded]] | None" = None
    """(example, rows, turns of each row, encoding, config) -> the rows of an example whose messages carry `loss`; only
    for rows of one part. None: every answer counts in full."""
    packer: "Callable[[TrainRun, Encoding], Packer | None]" = no_packer
    """Makes other rows of all tokenized rows (the blocks of pt, the packs of sft, the strangers of kto), or None."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a row before the packer has seen it."""
        weights = (WEIGHTS,) if self.weigh is not None else ()
        return (*(f"{part}{name}" for part in self.parts for name in SEQUENCE_COLUMNS), *weights, *self.tags)


def parts_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The prefixes of the parts that a row, or a list of columns, has."""
    return tuple(name.removesuffix("input_ids") for name in row if name.endswith("input_ids"))


def part_of(row: Mapping[str, Any], part: str) -> dict[str, Any]:
    """One part of a row under the plain names of its columns."""
    return {name: row[part + name] for name in (*SEQUENCE_COLUMNS, WEIGHTS, SAMPLE_LENGTHS) if part + name in row}


def is_of_row(column: str) -> bool:
    """Whether a column says something of a row as a whole, and not of one of its parts."""
    return not column.endswith((*SEQUENCE_COLUMNS, WEIGHTS, SAMPLE_LENGTHS))
