"""The traces of a run's largest batch: with all activations kept, and with every layer computed again."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier.core.machine import Machine
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.loading.training import is_reentrant
from luthier.model.modules import unwrap
from luthier.workflow.plan.counter import StepCounter
from luthier.workflow.plan.engine import Engine
from luthier.workflow.plan.shape import Shape, Unplanned, build_shape, layers_are_alike
from luthier.workflow.plan.trace import LossOf, Trace, against_frozen, trace_step
from luthier.workflow.plan.update import Update, arguments_of, own_optimizer, step_twice
from luthier.workflow.plan.work import Work

if TYPE_CHECKING:
    import torch

    from luthier.config.runs import TrainRun
    from luthier.stages import Stage
    from luthier.training.optimizers import Phase
    from luthier.workflow.plan.make import Sketch
    from luthier.workflow.text import TextSide

FEW_LAYERS, MORE_LAYERS = 2, 4
"""Models of these lengths are traced, and a longer one follows from them. Both are even, since the middle of the
backward pass is then between two layers (`Trace`)."""
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""Of code of the model that reads numbers, which tensors on `meta` do not have."""


@dataclass(frozen=True)
class Traces:
    """The step with all activations kept, and with every layer computed again."""

    kept: Trace
    trace_recomputed: Callable[[], Trace]
    """Called when it is needed, since most runs fit without recomputation. May raise `Unplanned`."""
    num_layers: int

    @cached_property
    def recomputed(self) -> Trace:
        return self.trace_recomputed()

    def at(self, num_recomputed: int) -> Trace:
        if not num_recomputed:
            return self.kept
        return self.kept.extended(self.recomputed, num_recomputed / self.num_layers)


def half_of(run: "TrainRun") -> "torch.dtype | None":
    """The format that autocast computes in."""
    import torch

    if run.training["bf16"]:
        return torch.bfloat16
    return torch.float16 if run.training["fp16"] else None


def trace_run(
    run: "TrainRun",
    stage: "Stage",
    text: "TextSide",
    drawn: "Sketch",
    machine: Machine,
    work: Work,
    engine: Engine,
    updates: Sequence[Update] = (),
) -> Traces:
    """`updates`: of one of Luthier's own optimizers. Raises `Unplanned` if the model reads numbers in its forward
    pass."""
    half = half_of(run) if engine.computes_on_half_weights else None
    phases = tuple(update.phase for update in updates)
    kind = (half is not None, engine.shards_gradients, engine.computes_on_half_weights, engine.is_fsdp)
    key = (work.heaviest, kind, phases)
    if key in drawn.traces:
        return drawn.traces[key]
    config, shape, own = drawn.config, drawn.shape, own_optimizer(run)
    freezes, frees = own is not None and own[0].freezes, own is not None and own[0].frees_gradients(own[1])
    # A short model has not the layer that alone trains.
    is_long = shape.num_layers > MORE_LAYERS and not freezes and layers_are_alike(shape, config)
    lengths = (FEW_LAYERS, MORE_LAYERS) if is_long else (None,)
    is_own = not is_long and not engine.computes_on_half_weights
    parts = [shape] if is_own else [build_shape(run, stage, text, config, machine, count) for count in lengths]
    on_device = machine.device != "cpu"

    def traced(phase: "Phase | None" = None, *, recomputes: bool) -> Trace:
        first, *others = (
            _traced(run, stage, part, work, engine, phase, recomputes=recomputes, on_device=on_device) for part in parts
        )
        steps = (shape.num_layers - FEW_LAYERS) / (MORE_LAYERS - FEW_LAYERS)
        return first.extended(others[0], steps) if others else first

    def traced_in_phases(*, recomputes: bool) -> Trace:
        if not (freezes or frees):
            return traced(recomputes=recomputes)
        return _worst([traced(phase, recomputes=recomputes) for phase in phases], [phase.share for phase in phases])

    kept = traced_in_phases(recomputes=False)  # first, since the model keeps its checkpointing
    drawn.traces[key] = Traces(kept, lambda: traced_in_phases(recomputes=True), shape.num_layers)
    return drawn.traces[key]


def _worst(traces: Sequence[Trace], shares: Sequence[float]) -> Trace:
    """The most bytes of all, and the mean of their operations."""
    calls = {
        call: sum(share * trace.calls.get(call, 0) for trace, share in zip(traces, shares, strict=True))
        for call in {call for trace in traces for call in trace.calls}
    }
    return Trace(
        max(trace.early_bytes for trace in traces),
        max(trace.late_bytes for trace in traces),
        max(trace.logits_bytes for trace in traces),
        calls,
    )


def _traced(
    run: "TrainRun",
    stage: "Stage",
    shape: Shape,
    work: Work,
    engine: Engine,
    phase: "Phase | None",
    *,
    recomputes: bool,
    on_device: bool,
) -> Trace:
    """`phase`: of an optimizer that changes the backward pass."""
    half, model, counter, own = half_of(run), shape.model, None, own_optimizer(run)
    if half is not None and engine.computes_on_half_weights:
        model.to(half)
    calls_of_update: Any = {}
    if phase is not None and own is not None:
        optimizer, config = own
        model = deepcopy(model)
        counter = StepCounter(model)
        with counter:
            built = optimizer.build(model, arguments_of(run), phase.config)
            if optimizer.frees_gradients(config):
                _, calls_of_update = step_twice(built, model, counter)
    if recomputes:
        enable_checkpointing(unwrap(model), use_reentrant=computes_again_reentrantly(run, engine))
    try:
        trace = trace_step(
            model,
            work.heaviest,
            reads="score" if stage.head == "score" else stage.reads,
            half=half,
            accumulates=run.training["gradient_accumulation_steps"] > 1,
            keeps_gradients=not engine.shards_gradients,
            is_sharded=engine.computes_on_half_weights,
            on_device=on_device,
            loss_of=_loss_of(run, stage),
            counter=counter,
        )
    except FAULTS as fault:
        raise Unplanned(f"a step cannot be traced ({first_line(fault)})") from fault
    # A step of the optimizer takes as long for a small batch as for the largest, so it is counted on its own.
    calls = {call: count - calls_of_update.get(call, 0) for call, count in trace.calls.items()}
    return replace(trace, calls=calls)


def computes_again_reentrantly(run: "TrainRun", engine: Engine) -> bool:
    return is_reentrant(run, by_fsdp=engine.is_fsdp) or run.model.use_unsloth_gc


def _loss_of(run: "TrainRun", stage: "Stage") -> LossOf | None:
    """That of a stage which compares whole distributions. Log-probabilities of frozen models take little memory."""
    names = [spec.name for spec in stage.frozen_models(run) if not spec.is_cached]
    return against_frozen(stage, run, names) if names and stage.reads == "cross_entropy" else None


def first_line(fault: Exception) -> str:
    return str(fault).strip().partition("\n")[0]
