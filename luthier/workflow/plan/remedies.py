"""What would make a run smaller, in order of what it costs.

checkpointing                a third more time, the same losses
smaller batches, accumulated a little time, the same losses
16 bits                      other rounding
quantized weights            other numbers
shorter rows                 what is cut off is not learned
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from luthier.core.kinds import ADAPTERS
from luthier.workflow.plan.memory import Held
from luthier.workflow.plan.shape import num_weight_bytes
from luthier.workflow.plan.trace import Trace
from luthier.workflow.plan.update import own_optimizer

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.workflow.plan.shape import Shape
    from luthier.workflow.plan.work import Work


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change and the peak with it alone."""

    keys: str
    """As in a run file."""
    peak_bytes: int
    cost: str


def remedies(
    run: "TrainRun",
    shape: "Shape",
    held: Held,
    recomputed: Trace | None,
    now: Trace,
    work: "Work",
    *,
    peak_in_half: Callable[[], int | None],
    is_sharded: bool = False,
) -> Sequence[Remedy]:
    """Those that lower the peak.

    `recomputed`: with every layer computed again. `peak_in_half`: with bf16, asked only of a run in float32. Both are
    None if that is unknown. `is_sharded`: by an engine that decides about formats and sums of gradients.
    """
    found = []
    size, own = run.training["per_device_train_batch_size"], own_optimizer(run)
    frees_gradients = own is not None and own[0].frees_gradients(own[1])
    if recomputed is not None and now.peak_bytes > recomputed.peak_bytes:
        peak = held.peak_bytes(recomputed)
        found.append(Remedy("disable_gradient_checkpointing: false", peak, "a third more time, the same losses"))
    of_one = work.longest_tokens / work.heaviest.num_tokens
    if size > 1 and frees_gradients:
        cost = "more steps, and each of them is noisier"
        found.append(Remedy("per_device_train_batch_size: 1", held.peak_bytes(_scaled(now, of_one)), cost))
    elif size > 1 and not is_sharded:
        accumulated = run.training["gradient_accumulation_steps"] * size
        keys = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {accumulated}"
        smaller = _scaled(now, of_one, held.gradients_bytes)
        found.append(Remedy(keys, held.peak_bytes(smaller), "the same losses, and more time for short rows"))
    in_float32 = shape.dtype.itemsize == 4 and not (run.training["bf16"] or run.training["fp16"])
    if in_float32 and not is_sharded and (peak_with_bf16 := peak_in_half()) is not None:
        found.append(Remedy("bf16: true", peak_with_bf16, "other rounding"))
    adds = ADAPTERS.get(run.finetuning_type).adds_weights
    if adds and run.quantization.quantization_bit is None and not is_sharded and run.parallel.tp_size == 1:
        low = replace(run, quantization=replace(run.quantization, quantization_bit=4))
        layers = frozenset(
            name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
            for name, _ in shape.model.named_parameters()
            if name.endswith(".base_layer.weight")
        )
        weights = num_weight_bytes(low, replace(shape, low_bit=layers))
        found.append(
            Remedy("quantization_bit: 4", replace(held, weights_bytes=weights).peak_bytes(now), "other numbers")
        )
    half = max(work.heaviest.lengths) // 2
    if half >= 16:
        shorter = held.peak_bytes(_scaled(now, 0.5))
        found.append(Remedy(f"cutoff_len: {half}", shorter, "what is cut off is not learned"))
    return [remedy for remedy in found if remedy.peak_bytes < held.peak_bytes(now)]


def _scaled(trace: Trace, share: float, extra_bytes: int = 0) -> Trace:
    """The trace of a batch with this share of the tokens."""
    return Trace(
        round(trace.early_bytes * share) + extra_bytes,
        round(trace.late_bytes * share) + extra_bytes,
        round(trace.logits_bytes * share),
        {call: count * share for call, count in trace.calls.items()},
    )
