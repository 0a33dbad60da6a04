"""The plan inside `train`: decides about recomputation, refuses what cannot fit, and is compared with what came."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.allocator import keep_freed_blocks, peak_resident_bytes, return_large_blocks
from luthier.core.errors import InvalidInput
from luthier.core.files import size
from luthier.core.log import info
from luthier.core.machine import Machine
from luthier.workflow.plan.engine import SPLIT_LAYERS
from luthier.workflow.plan.make import Plan, make_plan
from luthier.workflow.plan.recompute import Recompute, as_asked
from luthier.workflow.plan.room import least, room_of
from luthier.workflow.plan.shape import Unplanned
from luthier.workflow.plan.text import duration, remedy_lines

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.stages import Stage
    from luthier.workflow.text import TextSide

SURE_SHARE = 0.85
"""The plan is right within 15 %, so a run whose planned peak is above the free memory by less may still fit."""


MOST_HEAP_GROWTH = 1.4
"""The most that a process was seen to hold for each byte in use (`luthier.core.allocator`)."""


@dataclass(frozen=True, slots=True)
class Foresight:
    recompute: Recompute
    plan: Plan | None = None
    """None if the run has no model of its memory."""
    device: str = "cpu"

    def compared(self, seconds: float | None) -> dict[str, Any]:
        """For the report: planned and actual. `seconds`: of training, None if nothing was trained."""
        found: dict[str, Any] = {"gradient_checkpointing": self.recompute.reason}
        peak = peak_bytes(self.device)
        if peak is not None:
            found["peak_bytes"] = peak
        if seconds is not None:
            found["seconds"] = round(seconds, 1)
        if self.plan is not None:
            assert self.plan.seconds is not None, "the machine is here"
            found |= {"planned_peak_bytes": self.plan.peak_bytes, "planned_seconds": round(self.plan.seconds, 1)}
        return found


def foresee(run: "TrainRun", stage: "Stage", text: "TextSide", data: "PreparedData", machine: Machine) -> Foresight:
    """The same in all processes of a run. Raises `InvalidInput` if it surely does not fit into memory."""
    if not run.trains:
        return Foresight(Recompute(None, "nothing is trained"))
    from accelerate.utils import gather_object

    # Free memory differs from process to process. All of them plan with the least, so that they decide alike.
    room = least(gather_object([room_of(machine)]))
    try:
        plan = make_plan(run, stage, text, data, machine, room=room)
        assert plan.seconds is not None, "the machine is here"
        info(f"plan: peak memory {size(plan.peak_bytes)}, {plan.work.steps:,} steps, about {duration(plan.seconds)}")
        info(f"gradient checkpointing: {plan.recompute}")
        if not run.finetuning.skip_memory_check:
            require_fit(plan, machine.device)
    except Unplanned as fault:
        asked = as_asked(run)
        reason = asked.reason if asked else f"all layers are computed again: no plan, since {fault}"
        info(f"gradient checkpointing: {reason}")
        return Foresight(Recompute(None, reason), device=machine.device)
    if may_be_short(plan, machine.device):
        info("memory may be short: what is freed goes back to the system at once, which takes time")
        return_large_blocks()
    elif machine.device == "cpu":
        keep_freed_blocks()
    return Foresight(plan.recompute, plan, machine.device)


def may_be_short(plan: Plan, device: str) -> bool:
    """Whether the run fits only if the C library keeps no freed memory."""
    return (
        device == "cpu"
        and plan.available_bytes is not None
        and plan.peak_bytes * MOST_HEAP_GROWTH > plan.available_bytes
    )


def require_fit(plan: Plan, device: str) -> None:
    """Raises `InvalidInput` if the least that the run needs, or on a CPU its planned peak by a margin, is not there."""
    there = plan.available_bytes
    if there is None:
        return
    needed = _sure_bytes(plan)
    if device == "cpu" and not plan.engine.computes_on_half_weights:
        needed = max(needed, round(plan.peak_bytes * SURE_SHARE))
    if needed <= there:
        return
    remedies = list(remedy_lines(plan))
    hint = "\n".join(["; one of these needs less:", *remedies]) if remedies else ""
    each = " in each process" if plan.engine.num_processes > 1 else ""
    raise InvalidInput(
        f"this run needs {size(plan.peak_bytes)} of memory{each}, of which {size(plan.held.least_bytes)} are weights,"
        f" gradients, optimizer and libraries, and {size(there)} are there -> free some memory or take a smaller model,"
        f"{_more_processes(plan)} or set skip_memory_check: true to start anyway{hint}"
    )


def _sure_bytes(plan: Plan) -> int:
    """What the run holds whatever happens. The plan of ZeRO was never compared with a run, so what DeepSpeed holds only
    for a moment is not counted."""
    held = plan.held
    return held.least_bytes - (held.gathered_bytes + held.buckets_bytes if plan.engine.is_zero else 0)


def _more_processes(plan: Plan) -> str:
    if plan.engine.name == SPLIT_LAYERS:
        return " raise tp_size,"
    if plan.engine.shards_weights:
        return " start more processes,"
    return " share the weights among the processes with fsdp: true," if plan.engine.num_processes > 1 else ""


def peak_bytes(device: str) -> int | None:
    """The most memory that this process has held: of the host on a CPU, else of the accelerator."""
    if device == "cpu":
        return peak_resident_bytes()
    if device != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved()


def comparison(compared: Mapping[str, Any]) -> list[str]:
    """The lines that end the report of `train`."""
    lines = []
    if "peak_bytes" in compared:
        planned = compared.get("planned_peak_bytes")
        against = f" ({size(planned)} planned)" if planned else ""
        lines.append(f"peak memory: {size(compared['peak_bytes'])}{against}")
    if None not in (peaks := compared.get("peak_bytes_of_processes", [])) and peaks:
        lines.append(f"peak memory of each process: {', '.join(map(size, peaks))}")
    if "seconds" in compared:
        planned = compared.get("planned_seconds")
        against = f" ({duration(planned)} planned)" if planned is not None else ""
        lines.append(f"training time: {duration(compared['seconds'])}{against}")
    return lines
