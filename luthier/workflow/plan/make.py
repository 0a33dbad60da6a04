"""The plan of a run: its work, its parameters, its memory and its time, from the config of the model and the rows."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput
from luthier.core.machine import Machine
from luthier.model.loading.config import load_config
from luthier.stages import cached_reference
from luthier.workflow.plan.calls import Calls
from luthier.workflow.plan.duration import basis_of, measured_speed
from luthier.workflow.plan.engine import SPLIT_LAYERS, Engine, engine_of
from luthier.workflow.plan.images import Images, images_of, trace_images, with_images
from luthier.workflow.plan.memory import Held, checkpoint_bytes, held_by, with_updates
from luthier.workflow.plan.recompute import Recompute, as_asked, decide
from luthier.workflow.plan.remedies import Remedy, remedies
from luthier.workflow.plan.resolved import resolved
from luthier.workflow.plan.room import Room, room_of
from luthier.workflow.plan.shape import (
    Shape,
    Unplanned,
    build_shape,
    unplanned_reason,
)
from luthier.workflow.plan.sharing import share
from luthier.workflow.plan.split import narrow, split, wide_weights, without_wide_gradients
from luthier.workflow.plan.trace import Batch, Trace, trace_pass
from luthier.workflow.plan.traces import FAULTS, Traces, computes_again_reentrantly, first_line, half_of, trace_run
from luthier.workflow.plan.transfers import Transfer
from luthier.workflow.plan.update import Update, own_optimizer, updates_of
from luthier.workflow.plan.work import Work, work_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.stages import Stage
    from luthier.training.optimizers import Phase
    from luthier.workflow.text import TextSide


@dataclass(frozen=True, slots=True)
class Pattern:
    """Parameters of one name, layer numbers left out."""

    name: str
    parameters: int
    trainable: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures that a run without a shortage of memory does not need are computed when they are read."""

    work: Work
    images: Images | None
    """Of the largest batch."""
    parameters: int
    trainable_parameters: int
    patterns: Sequence[Pattern]
    resolved: Mapping[str, str]
    """What each `auto` becomes, with the reason."""
    recompute: Recompute
    available_bytes: int | None
    """Memory for the whole process, this one's own included."""
    held: Held
    traces: Traces
    num_recomputed: int
    engine: Engine
    transfers: Sequence[Transfer]
    """What the processes exchange in a step."""
    seconds: float | None
    """None for a machine that is not here. Without the time of transfers."""
    seconds_basis: str
    checkpoint_bytes: tuple[int, int]
    find_remedies: Callable[[], Sequence[Remedy]]

    @cached_property
    def what_if(self) -> Sequence[Remedy]:
        return self.find_remedies()

    @property
    def trace(self) -> Trace:
        return self.traces.at(self.num_recomputed)

    @property
    def peak_bytes(self) -> int:
        return self.held.peak_bytes(self.trace)

    @property
    def sent_bytes(self) -> int:
        """By each process in a step of the optimizer."""
        return sum(transfer.sent_bytes(self.engine.num_processes) for transfer in self.transfers)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What every plan of a run shares, whatever its processes."""

    config: "PreTrainedConfig"
    """Of what one process computes."""
    whole: Shape
    shape: Shape
    """What one process has of it (`tp_size`)."""
    untraced: "nn.Module | None"
    """The model of a run with images as it was built. Traces change that of `shape`."""
    traces: "dict[tuple[Batch, tuple[bool, ...], tuple[Phase, ...]], Traces]" = field(default_factory=dict)
    """Those that are known already."""


def sketch(run: "TrainRun", stage: "Stage", text: "TextSide", machine: Machine) -> Sketch:
    """Raises `Unplanned` for a run that has no model of its memory."""
    reason = unplanned_reason(run)
    if reason is not None:
        raise Unplanned(reason)
    config = load_config(text.source)
    whole = shape = build_shape(run, stage, text, config, machine)
    if run.parallel.tp_size > 1:
        config = deepcopy(config)
        narrow(config, run.parallel.tp_size)
        shape = build_shape(run, stage, text, config, machine)
    return Sketch(config, whole, shape, None if text.media is None else deepcopy(shape.model))


def make_plan(
    run: "TrainRun",
    stage: "Stage",
    text: "TextSide",
    data: "PreparedData",
    machine: Machine,
    engine: Engine | None = None,
    drawn: Sketch | None = None,
    room: Room | None = None,
) -> Plan:
    """Before the weights are loaded. `machine`: its `world_size` is the number of processes. `engine`: another one than
    the keys choose. `drawn`: a sketch of this run, if there is one. `room`: None for that of this process now. Raises
    `Unplanned` for a run that has no model of its memory."""
    room = room or room_of(machine)
    drawn = drawn or sketch(run, stage, text, machine)
    engine = engine or engine_of(run, machine.world_size)
    shape, memory = drawn.shape, _memory(run, stage, text, data, machine, engine, drawn, room)
    work, held, traces = memory.work, memory.held, memory.traces
    is_sharded = engine.computes_on_half_weights
    recompute = as_asked(run) or _decide(shape, held, traces, room, machine, is_sharded=is_sharded)
    num_recomputed = _num_recomputed(run, recompute, shape.num_layers)
    trace, parameters = traces.at(num_recomputed), dict(drawn.whole.model.named_parameters())
    calls = _calls(trace, work, _num_groups(run, machine), memory.updates)
    seconds, basis = _seconds(calls, machine, half_of(run) or shape.dtype, drawn.config)

    def peak_in_half() -> int | None:
        halved = with_bf16(run)
        try:
            drawn_in_half = sketch(halved, stage, text, machine)
            found = _memory(halved, stage, text, data, machine, engine, drawn_in_half, room)
            return found.held.peak_bytes(found.traces.at(num_recomputed))
        except Unplanned:
            return None

    return Plan(
        work=work,
        images=memory.images,
        parameters=sum(weight.numel() for weight in parameters.values()),
        trainable_parameters=sum(weight.numel() for weight in parameters.values() if weight.requires_grad),
        patterns=patterns_of(parameters),
        resolved=resolved(run, shape, recompute, machine),
        recompute=recompute,
        available_bytes=room.available_bytes,
        held=held,
        traces=traces,
        num_recomputed=num_recomputed,
        engine=engine,
        transfers=memory.transfers,
        seconds=seconds,
        seconds_basis=basis,
        checkpoint_bytes=checkpoint_bytes(run, shape, memory.alone, work.steps),
        find_remedies=lambda: remedies(
            run, shape, held, _recomputed(traces), trace, work, peak_in_half=peak_in_half, is_sharded=is_sharded
        ),
    )


@dataclass(frozen=True, slots=True)
class _Memory:
    """Of a process, before it is decided how many layers are computed again."""

    work: Work
    updates: Sequence[Update]
    alone: Held
    """By a single process."""
    held: Held
    transfers: Sequence[Transfer]
    images: Images | None
    traces: Traces


def _memory(
    run: "TrainRun",
    stage: "Stage",
    text: "TextSide",
    data: "PreparedData",
    machine: Machine,
    engine: Engine,
    drawn: Sketch,
    room: Room,
) -> _Memory:
    shape = drawn.shape
    work = _work(run, stage, data, shape, _num_groups(run, machine))
    updates = _updates(run, drawn, engine, work.steps)
    alone = with_updates(held_by(run, stage, text, drawn.whole, work, machine, room.libraries_bytes), updates)
    held = alone if shape is drawn.whole else held_by(run, stage, text, shape, work, machine, room.libraries_bytes)
    held, transfers = share(run, held, shape, engine, half_of(run), on_device=machine.device != "cpu")
    images = images_of(work.heaviest_rows, text.media, stage.num_learned_parts, shape.dtype)
    traces = trace_run(run, stage, text, drawn, machine, work, engine, updates)
    if engine.name == SPLIT_LAYERS:
        held, traces = _split(run, held, traces, drawn, engine.num_processes)
    if images is not None:
        traces = _with_images(run, traces, drawn, images, engine)
    held = _with_passes(run, stage, drawn, held, work, machine)
    return _Memory(work, updates, alone, held, transfers, images, traces)


def _num_groups(run: "TrainRun", machine: Machine) -> int:
    """Of processes that share rows or layers."""
    return machine.world_size // (run.parallel.sp_size * run.parallel.tp_size)


def with_bf16(run: "TrainRun") -> "TrainRun":
    """The same run with `bf16: true`."""
    return replace(run, training=run.training.changed({"bf16": True}))


def _recomputed(traces: Traces) -> Trace | None:
    """None if that step has no trace. The others of what would help are known without it."""
    try:
        return traces.recomputed
    except Unplanned:
        return None


def _split(run: "TrainRun", held: Held, traces: Traces, drawn: Sketch, num_processes: int) -> tuple[Held, Traces]:
    """Of processes that share each layer."""
    wide = wide_weights(drawn.whole, drawn.shape, num_processes)

    def narrowed(trace: Trace) -> Trace:
        return without_wide_gradients(trace, drawn.shape, wide, num_processes)

    kept, trace_recomputed = narrowed(traces.kept), lambda: narrowed(traces.recomputed)
    return split(run, held, drawn.shape, wide, num_processes), Traces(kept, trace_recomputed, traces.num_layers)


def _with_images(run: "TrainRun", traces: Traces, drawn: Sketch, images: Images, engine: Engine) -> Traces:
    """Of the language model, and of what reads images."""
    if engine.computes_on_half_weights:
        raise Unplanned(f"what reads {images.named} is planned for whole weights only, and {engine.name} shards them")
    assert drawn.untraced is not None, "the model reads images"
    untraced, half, use_reentrant = drawn.untraced, half_of(run), computes_again_reentrantly(run, engine)

    def added(step: Trace, *, recomputes: bool) -> Trace:
        try:
            seeing = trace_images(untraced, images, half=half, recomputes=recomputes, use_reentrant=use_reentrant)
            return with_images(step, seeing, images)
        except FAULTS as fault:
            raise Unplanned(f"what reads {images.named} cannot be traced ({first_line(fault)})") from fault

    kept = added(traces.kept, recomputes=False)
    return Traces(kept, lambda: added(traces.recomputed, recomputes=True), traces.num_layers)


def _with_passes(run: "TrainRun", stage: "Stage", drawn: Sketch, held: Held, work: Work, machine: Machine) -> Held:
    """And what passes without gradients hold: those of a reference before training, and of evaluations.

    They are not counted for a model of whose weights each process has a part."""
    half, on_device = half_of(run), machine.device != "cpu"

    def of_pass(batch: Batch | None, reads: str) -> int:
        if batch is None or held.gathered_bytes or run.parallel.sp_size * run.parallel.tp_size > 1:
            return 0
        try:
            return trace_pass(drawn.shape.model, batch, reads=reads, half=half, on_device=on_device)
        except FAULTS as fault:
            raise Unplanned(f"an evaluation cannot be traced ({first_line(fault)})") from fault

    spec = cached_reference(stage, run)
    reference = held.weights_bytes if spec is not None and spec.source is not None and work.scored else 0
    return replace(
        held,
        scoring_bytes=reference + of_pass(work.scored, "logps"),
        evaluating_bytes=of_pass(work.evaluated, "score" if stage.head == "score" else stage.reads),
    )


def _decide(shape: Shape, held: Held, traces: Traces, room: Room, machine: Machine, *, is_sharded: bool) -> Recompute:
    def peak_bytes(count: int) -> int:
        return held.peak_bytes(traces.at(count))

    return decide(shape.num_layers, peak_bytes, room.available_bytes, machine.device, is_sharded=is_sharded)


def _work(run: "TrainRun", stage: "Stage", data: "PreparedData", shape: Shape, num_groups: int) -> Work:
    try:
        return work_of(run, stage, data, pads=shape.padding_reason is not None, world_size=num_groups)
    except ValueError as fault:
        raise Unplanned(str(fault)) from fault


def _updates(run: "TrainRun", drawn: Sketch, engine: Engine, num_steps: int) -> Sequence[Update]:
    """Of one of Luthier's own optimizers."""
    own = own_optimizer(run)
    if own is not None and (engine.computes_on_half_weights or engine.name == SPLIT_LAYERS):
        raise Unplanned(f"{own[0].switch} needs whole weights, and {engine.name} gives each process a part of them")
    try:
        return updates_of(run, drawn.whole.model, num_steps)
    except InvalidInput:
        raise  # a key that does not fit the model, which training would refuse too
    except FAULTS as fault:
        raise Unplanned(f"a step of the optimizer cannot be traced ({first_line(fault)})") from fault


def _calls(trace: Trace, work: Work, num_groups: int, updates: Sequence[Update]) -> Calls:
    """The operations of a process in the whole run. `num_groups`: of processes that share rows or layers."""
    num_batches = work.tokens / work.heaviest_tokens / num_groups
    found = {call: count * num_batches for call, count in trace.calls.items()}
    for update in updates:
        for call, count in update.calls.items():
            found[call] = found.get(call, 0) + count * update.phase.share * work.steps
    return found


def _seconds(
    calls: Calls, machine: Machine, dtype: "torch.dtype", config: "PreTrainedConfig"
) -> tuple[float | None, str]:
    """(of all steps, what they rest on)."""
    if machine.is_assumed:
        operations = sum(call.operations * count for call, count in calls.items())
        return None, f"unknown: {operations / 1e12:,.3g} TFLOP of products for each process, on a machine not here"
    speed = measured_speed(dtype, machine.device, config.get_text_config().hidden_size)
    return speed.seconds_for(calls), basis_of(calls, speed, dtype)


def patterns_of(parameters: Mapping[str, Any]) -> list[Pattern]:
    found: dict[str, tuple[int, int]] = {}
    for name, weight in parameters.items():
        key = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
        total, trained = found.get(key, (0, 0))
        found[key] = (total + weight.numel(), trained + weight.numel() * weight.requires_grad)
    return [Pattern(key, *counts) for key, counts in found.items()]


def _num_recomputed(run: "TrainRun", recompute: Recompute, num_layers: int) -> int:
    if recompute.num_layers is not None:
        return recompute.num_layers
    keys = run.model
    return 0 if keys.disable_gradient_checkpointing else -(-num_layers // keys.checkpoint_every)
