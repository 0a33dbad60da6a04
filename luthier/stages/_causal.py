"""What pt and sft share: next-token cross-entropy over the labeled tokens of a batch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.data.collate import model_inputs
from luthier.model.types import Models
from luthier.stages import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.model.kernels.chunked_head import Weigh


def count_targets(batch: Mapping[str, Any]) -> float:
    """The number of labeled tokens of this batch, or the sum of their weights where rows have weights."""
    units = _units(batch)
    return units if isinstance(units, int) else float(units)


def _units(batch: Mapping[str, Any]) -> "Tensor | int":
    """The same, where it is: to read the sum of weights is to wait for the device."""
    return batch["weights"].sum() if "weights" in batch else batch["targets"].numel()


def next_token_loss(
    models: Models,
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    weigh: "Weigh | None" = None,
    with_accuracy: bool = False,
) -> LossOutput:
    """-sum_t w_t log p(x_t | x_<t) over the labeled tokens; `with_accuracy` adds the mean token accuracy of the rows.

    w_t is the weight in the row (1 if it has none) times that of `weigh`.
    """
    from luthier.model.heads.output_head import summed_loss

    total, best = summed_loss(
        models.policy,
        models.head,
        model_inputs(batch),
        batch["positions"],
        batch["targets"],
        label_smoothing=label_smoothing,
        weights=batch.get("weights"),
        weigh=weigh,
    )
    metrics = {"accuracy": _row_accuracy(best == batch["targets"], batch["target_rows"])} if with_accuracy else {}
    return with_router_loss(models, LossOutput(total, metrics), batch)


def with_router_loss(models: Models, output: LossOutput, batch: Mapping[str, Any]) -> LossOutput:
    """`output` plus the router balance loss (`luthier.model.features.router_balance`) times the units of the batch."""
    router = models.head.router
    balance = router.take() if router is not None else None
    if router is None or balance is None:
        return output
    units = _units(batch)
    summed = balance * units
    return LossOutput(output.total + router.coefficient * summed, {**output.metrics, "router_loss": (summed, units)})


def _row_accuracy(is_right: "Tensor", rows: "Tensor") -> "tuple[Tensor, int]":
    """(sum over rows of the row's accuracy, number of rows)."""
    import torch

    _, row_index, row_counts = rows.unique(return_inverse=True, return_counts=True)
    rights = torch.zeros_like(row_counts, dtype=torch.float32).index_add_(0, row_index, is_right.float())
    return (rights / row_counts).sum(), row_counts.numel()
