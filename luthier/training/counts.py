"""How much a batch holds, counted where it is made: on a device the host would have to wait for each count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.collate import FAULT, tokens_in
from luthier.training.distributed.sums import Collate

COUNTS = "counts_of_batch"
"""The entry of a batch with its counts."""


@dataclass(frozen=True, slots=True)
class Counts:
    num_units: float
    """What the loss is summed over, see `Stage.units`."""
    num_tokens: int
    """Without padding."""


@dataclass(frozen=True, slots=True)
class Counting:
    """Collates rows to a batch with its counts."""

    collate: Collate
    units: Callable[[Mapping[str, Any]], float]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        return batch if FAULT in batch else {**batch, COUNTS: self.of(batch)}

    def of(self, batch: Mapping[str, Any]) -> Counts:
        """Those of the batch, or counted now."""
        found: Counts | None = batch.get(COUNTS)
        return Counts(self.units(batch), tokens_in(batch)) if found is None else found
