"""What a run has added up since the last line of its log, and since it began. Every checkpoint keeps it.

So a run that is resumed between two lines logs the means of one that was never stopped, and `train_loss` is that of all
steps, whichever process took them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate.utils import gather

from luthier.training.distributed.sums import over_processes

if TYPE_CHECKING:
    from luthier.stages import Sums

KEY = "unlogged"
"""In `stateful_callbacks` of trainer_state.json."""


@dataclass(frozen=True, slots=True)
class Unlogged:
    last_line: int
    """The step of the last line."""
    logged_loss: float
    """The sum over the steps up to that line."""
    loss: float
    """The sum over the steps since then, a mean over the processes."""
    metrics: Mapping[str, tuple[float, float, str]]
    """Name -> (sum, count, format of the sum) over the steps since then and all processes."""
    left_out: tuple[int, int]
    """Steps since then whose update counts, and those whose update was left out."""

    @classmethod
    def of(
        cls, last_line: int, logged_loss: float, loss: torch.Tensor, metrics: "Sums", left_out: tuple[int, int]
    ) -> Self:
        """All processes ask together."""
        totals = over_processes(metrics, loss.device)
        formats = {name: str(total.dtype).removeprefix("torch.") for name, (total, _) in metrics.items()}
        named = {name: (*pair, formats[name]) for name, pair in totals.items()}
        return cls(last_line, logged_loss, gather(loss.detach()[None]).mean().item(), named, left_out)

    @classmethod
    def saved(cls, noted: Mapping[str, Any]) -> Self | None:
        """As in a checkpoint; None in one of a version that kept nothing."""
        return cls(**noted[KEY]) if KEY in noted else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def sums(self, device: torch.device, *, is_first: bool) -> "dict[str, tuple[torch.Tensor, float | torch.Tensor]]":
        """For one process: the first one has them all."""
        return {
            name: (torch.tensor(total * is_first, dtype=getattr(torch, kind), device=device), count * is_first)
            for name, (total, count, kind) in self.metrics.items()
        }
