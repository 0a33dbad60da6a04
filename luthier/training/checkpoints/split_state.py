"""Checkpoints of runs whose processes hold a part of each layer (`tp_size`): what each process has of the optimizer is
gathered when it is saved, and shared again when it is loaded. So another number of processes can go on.

The optimizer's groups are those of transformers, which depend on which weights are split. A run without `tp_size` has
others, so the state has a file of its own name.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import OutputError
from luthier.model.tensor_parallel import read_split, split_like, whole
from luthier.training.checkpoints.weights import check_filled

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SPLIT_OPTIMIZER, WHOLE_OPTIMIZER = "optimizer-split.pt", "optimizer.pt"
SCHEDULE = "scheduler.pt"


def require_same_split(checkpoint: Path, *, is_split: bool) -> None:
    """Raises `OutputError` if the optimizer of a checkpoint is of a run with `tp_size`, and this run has none, or the
    other way round. A checkpoint of weights alone suits both."""
    remedy = "or start from its weights (model_name_or_path or adapter_name_or_path)"
    if not is_split and (checkpoint / SPLIT_OPTIMIZER).is_file():
        raise OutputError(
            f"{checkpoint}: it was saved with tp_size, and this run does not split layers"
            f" -> set tp_size to 2 or more, {remedy}"
        )
    if is_split and (checkpoint / WHOLE_OPTIMIZER).is_file():
        raise OutputError(f"{checkpoint}: it was saved without tp_size -> leave tp_size out, {remedy}")


def save_optimizer(optimizer: Any, schedule: Any, folder: Path, *, writes: bool) -> None:
    """All processes call it together; the one that `writes` keeps and writes the state."""
    import torch

    state: dict[str, Any] = optimizer.state_dict()
    found: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        gathered = {name: whole(value) for name, value in values.items()}
        if writes:
            found[number] = {name: _on_cpu(value) for name, value in gathered.items()}
    if writes:
        torch.save({**state, "state": found}, folder / SPLIT_OPTIMIZER)
        torch.save(schedule.state_dict(), folder / SCHEDULE)


def _on_cpu(value: Any) -> Any:
    import torch

    return value.cpu() if isinstance(value, torch.Tensor) else value


def load_optimizer(optimizer: Any, schedule: Any, checkpoint: Path) -> None:
    """Nothing of a checkpoint that holds weights only. All processes call it together."""
    import torch

    if not ((checkpoint / SPLIT_OPTIMIZER).is_file() and (checkpoint / SCHEDULE).is_file()):
        return
    saved = torch.load(checkpoint / SPLIT_OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    weights: list[Tensor] = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(weights):
        raise ValueError(f"mismatch of the trained weights: {len(numbers)} are saved, and the run has {len(weights)}")
    for number, weight in zip(numbers, weights, strict=True):
        values = saved["state"].get(number, {})
        saved["state"][number] = {name: _part_of(value, weight) for name, value in values.items()}
    optimizer.load_state_dict(saved)
    schedule.load_state_dict(torch.load(checkpoint / SCHEDULE, weights_only=True))


def _part_of(value: Any, weight: "Tensor") -> Any:
    """A state has the shape of its weight, or is one number."""
    import torch

    return split_like(value, weight) if isinstance(value, torch.Tensor) and value.shape == weight.shape else value


def fill_weights(model: "PreTrainedModel", checkpoint: Path) -> None:
    """Give each process its part of the weights of a checkpoint, whose files hold them as a whole."""
    saved, missing, unexpected = read_split(model, checkpoint)
    check_filled(model, missing, unexpected)
    _copy(dict(saved.named_parameters()), dict(model.named_parameters()))
    _copy(dict(saved.named_buffers()), dict(model.named_buffers()))


def _copy(saved: "dict[str, Any]", weights: "dict[str, Any]") -> None:
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        for name, weight in weights.items():
            values = saved[name]
            own, read = (one.to_local() if isinstance(one, DTensor) else one for one in (weight, values))
            own.copy_(read)
