"""What one of several processes holds: `Held` of a single process, spread by an engine.

ddp      beside the gradients, the buckets in which they travel, of the same size
zero     weights and gradients in 16 bits where the run computes in them; the optimizer then has float32 weights too
zero3    the weights that DeepSpeed keeps gathered, at most `stage3_max_live_parameters`
fsdp2    the gathered weights of the layer that computes and of the next one, of the head, and of what is in no
         layer; the gradients of a layer, and twice their bytes on the way. accelerate adds gradients up whole
         until the last micro-batch of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from luthier.workflow.plan.engine import SPLIT_LAYERS
from luthier.workflow.plan.groups import Group, groups_of, padded_bytes
from luthier.workflow.plan.memory import Held
from luthier.workflow.plan.states import states_bytes, states_of
from luthier.workflow.plan.transfers import Transfer, transfers_of

if TYPE_CHECKING:
    import torch

    from luthier.config.runs import TrainRun
    from luthier.workflow.plan.engine import Engine
    from luthier.workflow.plan.shape import Shape

MASTER_BYTES = 4
"""ZeRO computes in 16 bits and keeps a float32 copy of each trained number for the optimizer."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of whole tensors."""

    weights_bytes: int
    """In the format that they compute in."""
    trained_bytes: int
    """Of these, the trained ones."""
    num_trained: int
    buffers_bytes: int


def share(
    run: "TrainRun", held: Held, shape: "Shape", engine: "Engine", half: "torch.dtype | None", *, on_device: bool
) -> tuple[Held, list[Transfer]]:
    """`held`: of a single process. `half`: the format of autocast. `on_device`: the host has memory of its own."""
    if engine.num_processes == 1 or engine.name == SPLIT_LAYERS:
        return held, []
    numbers = _numbers(shape, half if engine.computes_on_half_weights else None, held)
    groups = groups_of(shape.model, engine, half) if engine.name == "fsdp2" else []
    num_micro_batches = run.training["gradient_accumulation_steps"]
    transfers = transfers_of(
        engine,
        groups=groups,
        weights_bytes=numbers.weights_bytes,
        trained_bytes=numbers.trained_bytes,
        gradients_bytes=numbers.trained_bytes,
        buffers_bytes=numbers.buffers_bytes,
        num_micro_batches=num_micro_batches,
    )
    if engine.name == "ddp":
        host = held.weights_bytes if on_device else 0
        return replace(held, buckets_bytes=held.gradients_bytes, host_bytes=host), transfers
    if engine.name == "fsdp2":
        spread = _of_fsdp(run, held, shape, engine, groups, accumulates=num_micro_batches > 1)
    else:
        spread = _of_zero(run, held, engine, numbers, masters=half is not None)
    whole = spread.loading_bytes + max(held.weights_bytes - spread.weights_bytes, 0)
    if not on_device:
        return replace(spread, loading_bytes=whole), transfers
    return _offloaded(replace(spread, host_bytes=held.weights_bytes), engine), transfers


def _numbers(shape: "Shape", half: "torch.dtype | None", held: Held) -> Numbers:
    """The quantized weights of `held` stay as they are."""
    weights = {id(weight): weight for weight in shape.model.parameters()}.values()
    trained = [weight for weight in weights if weight.requires_grad]

    def size(weight: "torch.Tensor") -> int:
        return weight.numel() * (weight.element_size() if half is None else half.itemsize)

    buffers = {id(buffer): buffer.nbytes for buffer in shape.model.buffers()}
    whole = held.weights_bytes if shape.low_bit else sum(map(size, weights))
    return Numbers(whole, sum(map(size, trained)), sum(weight.numel() for weight in trained), sum(buffers.values()))


def _of_zero(run: "TrainRun", held: Held, engine: "Engine", numbers: Numbers, *, masters: bool) -> Held:
    count = engine.num_processes
    # DeepSpeed's optimizer steps on one flat tensor.
    states = states_of(run.training["optim"]).num_bytes(numbers.num_trained, MASTER_BYTES, is_embedding=False)
    kept = numbers.num_trained * MASTER_BYTES * masters
    number_bytes = 2 if masters else MASTER_BYTES
    # DeepSpeed fills one bucket while the other travels.
    buckets = min(2 * engine.bucket_numbers * number_bytes, numbers.trained_bytes)
    gathered = min(numbers.weights_bytes, engine.max_live_numbers * number_bytes) if engine.shards_weights else 0
    return replace(
        held,
        weights_bytes=numbers.weights_bytes // (count if engine.shards_weights else 1),
        gradients_bytes=numbers.trained_bytes // (count if engine.shards_gradients else 1),
        optimizer_bytes=round((states + kept) / count),
        gathered_bytes=gathered,
        buckets_bytes=buckets,
        traces_gradients=not engine.shards_gradients,
    )


def _of_fsdp(
    run: "TrainRun", held: Held, shape: "Shape", engine: "Engine", groups: Sequence[Group], *, accumulates: bool
) -> Held:
    count = engine.num_processes
    weights = {id(weight): weight for weight in shape.model.parameters()}.values()
    local = {id(weight): padded_bytes(weight, count) // count for weight in weights}
    trained = sum(local[id(weight)] for weight in weights if weight.requires_grad)
    buffers = sum({id(buffer): buffer.nbytes for buffer in shape.model.buffers()}.values())
    freed = sorted((group.gathered_bytes for group in groups if group.is_freed), reverse=True)
    kept = sum(group.gathered_bytes for group in groups if not group.is_freed)
    reduced = max(group.reduced_bytes for group in groups)
    whole = sum(group.reduced_bytes for group in groups) if accumulates else reduced
    return replace(
        held,
        weights_bytes=held.weights_bytes // count if shape.low_bit else sum(local.values()) + buffers,
        gradients_bytes=trained,
        optimizer_bytes=states_bytes(
            run.training["optim"], shape.model, lambda weight: local[id(weight)] // weight.element_size()
        ),
        gathered_bytes=kept + sum(freed[:2]),
        buckets_bytes=whole + 2 * reduced,
        traces_gradients=False,
    )


def _offloaded(held: Held, engine: "Engine") -> Held:
    """Moves to the host what the engine keeps there. The host also holds the whole weights while they are loaded."""
    moved = 0
    if engine.offloads_optimizer:
        moved += held.optimizer_bytes
        held = replace(held, optimizer_bytes=0)
        if engine.shards_gradients:
            moved += held.gradients_bytes
            held = replace(held, gradients_bytes=0)
    if engine.offloads_weights:
        moved += held.weights_bytes
        held = replace(held, weights_bytes=0)
    return replace(held, host_bytes=max(held.host_bytes, moved))
