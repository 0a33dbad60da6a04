"""A plan as lines for a reader, and as JSON."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from luthier.core.files import size
from luthier.workflow.plan.engine import SPLIT_LAYERS, Engine
from luthier.workflow.plan.make import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    one, kept = plan.checkpoint_bytes
    work = plan.work
    return {
        "rows": work.rows,
        "tokens": work.tokens,
        "steps": work.steps,
        "epochs": round(work.epochs, 4),
        "tokens_per_epoch": work.tokens_per_epoch,
        "largest_batch": {
            "tokens": work.heaviest.num_tokens,
            "labeled": work.heaviest.num_targets,
            "images": 0 if plan.images is None else plan.images.number,
            "image_tokens": 0 if plan.images is None else plan.images.num_tokens,
            "pixel_bytes": 0 if plan.images is None else plan.images.pixel_bytes,
        },
        "parameters": plan.parameters,
        "trainable_parameters": plan.trainable_parameters,
        "parameters_by_name": [asdict(pattern) for pattern in plan.patterns],
        "resolved": dict(plan.resolved),
        "peak_bytes": plan.peak_bytes,
        "available_bytes": plan.available_bytes,
        "memory": dict(plan.held.parts(plan.trace)),
        "engine": plan.engine.name,
        "processes": plan.engine.num_processes,
        "host_bytes": plan.held.host_bytes,
        "transfers": [
            {**asdict(transfer), "sent_bytes": transfer.sent_bytes(plan.engine.num_processes)}
            for transfer in plan.transfers
        ],
        "sent_bytes_per_step": plan.sent_bytes,
        "seconds": None if plan.seconds is None else round(plan.seconds, 1),
        "seconds_basis": plan.seconds_basis,
        "checkpoint_bytes": one,
        "disk_bytes": kept,
        "what_if": [asdict(remedy) for remedy in plan.what_if],
    }


def lines_of(plan: Plan) -> Iterator[str]:
    work, (one, kept) = plan.work, plan.checkpoint_bytes
    rows = "a stream of rows" if work.rows is None else f"{work.rows:,} rows"
    yield (
        f"work         {rows}, {work.tokens:,} tokens, {work.steps:,} steps ({work.epochs:,.2f} epochs); largest batch"
        f" {work.heaviest.num_tokens:,} tokens, {work.heaviest.num_targets:,} labeled"
    )
    if plan.images is not None:
        yield (
            f"  {plan.images.named} of the largest batch: {plan.images.number:,}, {plan.images.num_tokens:,} tokens,"
            f" {size(plan.images.pixel_bytes)} of pixels"
        )
    share = plan.trainable_parameters / plan.parameters
    yield f"parameters   {plan.parameters:,}, trainable {plan.trainable_parameters:,} ({share:.4%})"
    for pattern in plan.patterns:
        trained = f", trainable {pattern.trainable:,}" if pattern.trainable else ""
        yield f"  {pattern.name}: {pattern.parameters:,}{trained}"
    yield "settings"
    for key, value in plan.resolved.items():
        yield f"  {key}: {value}"
    there = "" if plan.available_bytes is None else f", {size(plan.available_bytes)} are there"
    yield f"peak memory  {size(plan.peak_bytes)} for each process{there}"
    for name, num_bytes in plan.held.parts(plan.trace).items():
        if num_bytes:
            yield f"  {name.replace('_', ' ')}: {size(num_bytes)}"
    yield "  (each part at its own worst, not all at the same time)"
    if plan.held.margin_share:
        yield "  (the model of accelerators has not been compared with a device yet)"
    if plan.held.host_bytes:
        yield f"  host: {size(plan.held.host_bytes)} beside it, for weights that are loaded and for what is offloaded"
    yield from _engine_lines(plan)
    seconds = "" if plan.seconds is None else f"{duration(plan.seconds)}: "
    yield f"time         {seconds}{plan.seconds_basis}"
    yield f"disk         {size(one)} for a checkpoint, {size(kept)} at the end"
    if plan.what_if:
        yield "what if"
        yield from remedy_lines(plan)


def _engine_lines(plan: Plan) -> Iterator[str]:
    if plan.engine.name == SPLIT_LAYERS:
        yield f"processes    {plan.engine}; what they exchange in each layer is not planned"
    if not plan.transfers:
        return
    yield f"processes    {plan.engine}; each sends {size(plan.sent_bytes)} in a step of the optimizer"
    for transfer in plan.transfers:
        times = "" if transfer.times == 1 else f" x {transfer.times}"
        yield f"  {transfer.kind} of {transfer.what}: {size(transfer.num_bytes)}{times}"


@dataclass(frozen=True, slots=True)
class Absent:
    """A plan that cannot be made."""

    engine: Engine
    reason: str


def table_of(plans: Iterable[Plan | Absent]) -> Iterator[str]:
    """Markdown: a line for each plan, sizes in GB for each process. Below it, why there is no plan of some engines."""
    names = ("weights", "gathered_weights", "gradients", "gradients_on_their_way", "optimizer")
    heads = ("weights", "gathered", "gradients", "on their way", "optimizer", "activations", "peak", "fits", "host")
    yield f"| processes | engine | {' | '.join(heads)} | sent per step |"
    yield "|" + "---|" * (len(heads) + 3)
    reasons: dict[str, dict[str, None]] = {}
    for plan in plans:
        if isinstance(plan, Absent):
            reasons.setdefault(plan.reason, {})[plan.engine.name] = None
            yield f"| {plan.engine.num_processes:,} | {plan.engine.name} |{' - |' * (len(heads) + 1)}"
            continue
        parts = plan.held.parts(plan.trace)
        sizes = [parts[name] for name in names] + [parts["activations"] + parts["logits"], plan.peak_bytes]
        fits = "" if plan.available_bytes is None else "yes" if plan.peak_bytes <= plan.available_bytes else "no"
        cells = [*(f"{num_bytes / 1e9:,.1f}" for num_bytes in sizes), fits]
        cells += [f"{num_bytes / 1e9:,.1f}" for num_bytes in (plan.held.host_bytes, plan.sent_bytes)]
        yield f"| {plan.engine.num_processes:,} | {plan.engine.name} | {' | '.join(cells)} |"
    for reason, engines in reasons.items():
        yield f"{', '.join(engines)}: {reason}"


def remedy_lines(plan: Plan) -> Iterator[str]:
    for remedy in plan.what_if:
        yield f"  {remedy.keys}: {size(remedy.peak_bytes)} ({remedy.cost})"


def duration(seconds: float) -> str:
    """`12 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
