"""Work across processes: adding up sums, and sharing the rows of a pass without gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from accelerate.utils import gather, gather_object

from luthier.data.collate import require_whole
from luthier.stages import Sums

if TYPE_CHECKING:
    from transformers import TrainingArguments

Result = TypeVar("Result")
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Rows -> batch of tensors."""


class Rows(Sized, Protocol):
    """Anything with a length and rows by index, such as a `datasets.Dataset`."""

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def add_to(sums: "dict[str, tuple[torch.Tensor, float | torch.Tensor]]", more: Sums) -> None:
    """Add each (sum, count) in place to the one of the same name."""
    for name, (total, count) in more.items():
        total_before, count_before = sums.get(name, (0, 0))
        sums[name] = (total_before + total.detach(), count_before + count)


def over_processes(sums: Sums, device: torch.device) -> dict[str, tuple[float, float]]:
    """name -> (sum, count) over all processes. Every process must have the same names."""
    if not sums:
        return {}
    pairs = [
        [total.detach().double().to(device), torch.as_tensor(count).double().to(device)]
        for total, count in sums.values()
    ]
    table = torch.stack([torch.stack(pair) for pair in pairs])
    rows = gather(table[None]).sum(0).tolist()
    return {name: (total, count) for name, (total, count) in zip(sums, rows, strict=True)}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors, and those in the mappings of a batch."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return to_device(value, device) if isinstance(value, Mapping) else value

    return {name: moved(value) for name, value in batch.items()}


def batch_by_batch(
    batches: Iterable[Mapping[str, Any]], device: torch.device, compute: Callable[[dict[str, Any]], Result]
) -> list[Result]:
    """The result of `compute` for each batch, on `device` and without gradients."""
    found = []
    with torch.no_grad():
        for batch in batches:
            require_whole([batch])
            found.append(compute(to_device(batch, device)))
    return found


def for_every_row(
    rows: Rows, args: "TrainingArguments", collate: Collate, compute: Callable[[dict[str, Any]], Sequence[Result]]
) -> list[Result]:
    """The result of `compute` for every row, in order, gathered on all processes.

    Each process takes its share of the rows in batches of `per_device_eval_batch_size`, without gradients. `compute`:
    batch -> one result per row.
    """
    mine = range(args.process_index, len(rows), args.world_size)
    batches = (
        collate([rows[index] for index in mine[start : start + args.eval_batch_size]])
        for start in range(0, len(mine), args.eval_batch_size)
    )
    results = [result for batch in batch_by_batch(batches, args.device, compute) for result in batch]
    found: list[tuple[int, Result]] = gather_object(list(zip(mine, results, strict=True)))
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]
