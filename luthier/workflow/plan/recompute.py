"""How many layers are computed again in the backward pass, where the run file does not say.

Recomputation costs a third of the time. So none is computed again if all activations fit with room to spare, the first
k if that is enough, and otherwise all. The losses are the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.keys.fsdp import fsdp_settings
from luthier.config.keys.training import read_mapping
from luthier.core.files import size

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

ASKED_BY = ("disable_gradient_checkpointing", "use_unsloth_gc", "checkpoint_every", "use_reentrant_gc")
"""Keys by which the user decides."""
SHARE_TO_FILL = {"cpu": 0.75}
"""Of the free memory. The plan is right within 15 %."""
SHARE_UNVERIFIED = 0.5
"""Where the plan was never compared with a measured run."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """What is decided about checkpointing."""

    num_layers: int | None
    """The first so many layers; 0 for none, None for what the keys of the run say."""
    reason: str

    def __str__(self) -> str:
        return self.reason


def as_asked(run: "TrainRun") -> Recompute | None:
    """The user's own decision, or None."""
    keys = [key for key in ASKED_BY if key in run.given]
    if run.training["fsdp"]:
        config = read_mapping("fsdp_config", run.training["fsdp_config"])
        if fsdp_settings(run.training, config).values.get("activation_checkpointing"):
            keys.append("activation_checkpointing of fsdp_config")
    return Recompute(None, f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} given") if keys else None


def decide(
    num_layers: int,
    peak_bytes: Callable[[int], float],
    available_bytes: int | None,
    device: str = "cpu",
    *,
    is_sharded: bool = False,
) -> Recompute:
    """`peak_bytes`: number of layers computed again -> planned peak, falling. `available_bytes`: for the whole process;
    None if the system does not say. `is_sharded`: by FSDP or DeepSpeed, whose peak was never compared with a run."""
    if available_bytes is None:
        return Recompute(None, "all layers are computed again: this system does not say how much memory is free")
    share = SHARE_UNVERIFIED if is_sharded else SHARE_TO_FILL.get(device, SHARE_UNVERIFIED)
    room = share * available_bytes
    kept = peak_bytes(0)
    there = f"{size(available_bytes)} are there"
    if kept <= room:
        return Recompute(0, f"no layer is computed again: all activations fit ({size(kept)} planned, {there})")
    least = peak_bytes(num_layers)
    if least > room or kept <= least:
        return Recompute(None, f"all layers are computed again: {size(kept)} would be needed otherwise, {there}")
    count = min(math.ceil((kept - room) / (kept - least) * num_layers), num_layers)
    if count == num_layers:
        return Recompute(None, f"all layers are computed again: {size(kept)} would be needed otherwise, {there}")
    return Recompute(
        count,
        f"the first {count} of {num_layers} layers are computed again: {size(peak_bytes(count))} planned instead of"
        f" {size(kept)}, {there}",
    )
