"""How the processes of a run share its weights, gradients and optimizer: torchrun's DDP, FSDP 2, or DeepSpeed ZeRO.

ddp      every process has everything; gradients are averaged           https://arxiv.org/abs/2006.15704
fsdp2    each has 1/N of weights, gradients and optimizer               https://arxiv.org/abs/2304.11277
zero1    1/N of the optimizer                                           https://arxiv.org/abs/1910.02054
zero2    1/N of gradients and optimizer
zero3    1/N of weights, gradients and optimizer
tp       1/N of each layer, with its gradients and optimizer            https://arxiv.org/abs/1909.08053
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.keys.fsdp import fsdp_settings
from luthier.config.keys.training import read_mapping
from luthier.workflow.plan.shape import Unplanned

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
ONE_PROCESS, SPLIT_LAYERS = "one process", "tp"
REDUCE_BUCKET_NUMBERS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`."""
MAX_LIVE_NUMBERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: how many gathered weights it keeps."""


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    """One of `ENGINES`, `ONE_PROCESS` or `SPLIT_LAYERS`."""
    num_processes: int = 1
    reshards: bool = True
    """FSDP 2 frees the weights of a layer after its forward pass, and gathers them again for the backward pass."""
    wrapped: tuple[str, ...] = ()
    """FSDP 2: classes of the modules that are gathered one by one; () for those that the model names."""
    offloads_weights: bool = False
    """They are kept in the memory of the host."""
    offloads_optimizer: bool = False
    bucket_numbers: int = REDUCE_BUCKET_NUMBERS
    max_live_numbers: int = MAX_LIVE_NUMBERS

    @property
    def shards_weights(self) -> bool:
        return self.name in ("fsdp2", "zero3")

    @property
    def shards_gradients(self) -> bool:
        return self.shards_weights or self.name == "zero2"

    @property
    def is_fsdp(self) -> bool:
        return self.name == "fsdp2"

    @property
    def is_zero(self) -> bool:
        return self.name.startswith("zero")

    @property
    def computes_on_half_weights(self) -> bool:
        """With `bf16` or `fp16` the weights of a layer are 16-bit numbers while it computes, the trained ones too."""
        return self.is_zero or self.is_fsdp

    def __str__(self) -> str:
        if self.name == ONE_PROCESS:
            return self.name
        offloaded = [
            what
            for what, is_there in (("weights", self.offloads_weights), ("optimizer", self.offloads_optimizer))
            if is_there
        ]
        beside = f", {' and '.join(offloaded)} in the memory of the host" if offloaded else ""
        return f"{self.name}, {self.num_processes:,} processes{beside}"


def engine_of(run: "TrainRun", num_processes: int) -> Engine:
    """The one that the keys `deepspeed` and `fsdp` choose. Raises `Unplanned` where it has no model."""
    keys = run.training
    if run.parallel.tp_size > 1:
        return Engine(SPLIT_LAYERS, num_processes)
    if keys["deepspeed"]:
        return _zero(read_mapping("deepspeed", keys["deepspeed"]), num_processes)
    if keys["fsdp"]:
        return _fsdp(run, num_processes)
    return Engine("ddp" if num_processes > 1 else ONE_PROCESS, num_processes)


def _zero(config: Mapping[str, Any], num_processes: int) -> Engine:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise Unplanned(f"DeepSpeed has no ZeRO stage {stage}")
    if stage == 0:
        return Engine("ddp", num_processes)
    return Engine(
        f"zero{stage}",
        num_processes,
        offloads_weights=stage == 3 and _is_offloaded(zero, "offload_param"),
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        bucket_numbers=_number(zero.get("reduce_bucket_size"), REDUCE_BUCKET_NUMBERS),
        max_live_numbers=_number(zero.get("stage3_max_live_parameters"), MAX_LIVE_NUMBERS),
    )


def _is_offloaded(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def _number(value: Any, default: int) -> int:
    """`auto` depends on the model and is smaller."""
    return int(value) if isinstance(value, int | float) else default


def _fsdp(run: "TrainRun", num_processes: int) -> Engine:
    config = read_mapping("fsdp_config", run.training["fsdp_config"])
    values = fsdp_settings(run.training, config).values
    if str(values.get("version", 2)) == "1":
        raise Unplanned("FSDP 1 spreads its weights in its own way")
    if values.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP") != "TRANSFORMER_BASED_WRAP":
        raise Unplanned("FSDP gathers modules by a policy of its own")
    return Engine(
        "fsdp2",
        num_processes,
        reshards=values.get("reshard_after_forward", True) is not False,
        wrapped=tuple(values.get("transformer_layer_cls_to_wrap", ())),
        offloads_weights=bool(values.get("cpu_offload")),
        offloads_optimizer=bool(values.get("cpu_offload")),
    )
