"""The lengths of rows, for a sampler that puts rows of like lengths together (`train_sampling_strategy`)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.data.rows.arrow import row_lengths
from luthier.training.reference_logps import RowsWithReference

if TYPE_CHECKING:
    from luthier.data.rows.table import Table


@dataclass(frozen=True, slots=True)
class Lengths:
    """Stands in for a table of rows. transformers reads the number of `input_ids` of each row, and nothing else."""

    num_tokens: list[int]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, number: int) -> dict[str, range]:
        return {"input_ids": range(self.num_tokens[number])}


def as_long_as(rows: "Table | RowsWithReference") -> Lengths:
    """A row of several texts, such as a pair of answers, is as long as all of them."""
    return Lengths(row_lengths(rows.rows if isinstance(rows, RowsWithReference) else rows).tolist())
