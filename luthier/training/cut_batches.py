"""A step that runs out of memory begins again, with each of its batches in smaller parts.

The loss of a batch is a sum over its rows, divided by the units of the whole step. So the parts of a batch have the
gradients of the whole to rounding, as long as nothing in the model couples rows; dropout draws other numbers.

A batch keeps the rows that it was made of, since in tensors they may be concatenated, padded or share tokens.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache

from luthier.training.distributed.sums import Collate

if TYPE_CHECKING:
    from torch import nn

ROWS = "rows_of_batch"
"""The entry of a batch with its rows."""


class Rows:
    """The rows of a batch. Not a sequence: code that moves batches to a device looks into sequences."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows


@dataclass(frozen=True, slots=True)
class KeepsRows:
    """Collates rows to a batch that keeps them."""

    collate: Collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), ROWS: Rows(rows)}


@dataclass(frozen=True, slots=True)
class RandomState:
    """The random numbers to come, on the host and on CUDA devices: all of them, or that of one process of several."""

    host: torch.Tensor
    devices: Mapping[int, torch.Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        if not torch.cuda.is_initialized():
            return cls(torch.get_rng_state(), {})
        is_shared = torch.distributed.is_initialized()
        numbers = [torch.cuda.current_device()] if is_shared else range(torch.cuda.device_count())
        return cls(torch.get_rng_state(), {number: torch.cuda.get_rng_state(number) for number in numbers})

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        for number, state in self.devices.items():
            torch.cuda.set_rng_state(state, number)


def num_rows(batch: Mapping[str, Any]) -> int:
    """Of a batch that keeps its rows; 1 for others, which cannot be cut."""
    return len(batch[ROWS].rows) if ROWS in batch else 1


def cut(batch: dict[str, Any], num_parts: int, collate: Collate) -> Iterator[dict[str, Any]]:
    """The batch in `num_parts` parts of nearly equal numbers of rows; in fewer if it has fewer rows."""
    num_parts = min(num_parts, num_rows(batch))
    if num_parts == 1:
        yield batch
        return
    rows = batch[ROWS].rows
    for part in range(num_parts):
        yield collate(rows[part * len(rows) // num_parts : (part + 1) * len(rows) // num_parts])


def can_begin_again(model: "nn.Module") -> bool:
    """Whether a step has changed nothing but gradients so far. Some optimizers update weights during backward."""
    return not any(weight._post_accumulate_grad_hooks for weight in model.parameters())


def clear(model: "nn.Module") -> None:
    """Forget the gradients, and free what an interrupted step left in memory."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    clear_device_cache()
