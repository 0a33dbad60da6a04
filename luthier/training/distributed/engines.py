"""What differs between the engines that share a run among processes: DDP, FSDP 2 and DeepSpeed.

Where weights are sharded, accelerate lays them out after the model is built. Every process loads the whole model into
the memory of its machine first, so adapters, new tokens and reference scores are made as in a run of one process.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import MissingExtra, OutputError

if TYPE_CHECKING:
    from accelerate import Accelerator

DDP, FSDP, DEEPSPEED = "whole weights in each process", "FSDP", "DeepSpeed"
_SHARDS = "*zero_pp_rank_*_optim_states.pt"


@contextmanager
def loading_whole() -> Iterator[None]:
    """While open, transformers does not shard the weights of a model for ZeRO-3 as it is built."""
    from transformers.integrations import deepspeed

    settings, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings


@contextmanager
def gathering_whole(accelerator: "Accelerator") -> Iterator[None]:
    """While open, FSDP gives whole weights to what is saved, also in runs whose checkpoints have one file per process
    (`state_dict_type: SHARDED_STATE_DICT`)."""
    from torch.distributed.fsdp import StateDictType

    if engine_of(accelerator) != FSDP:
        yield
        return
    plugin: Any = accelerator.state.fsdp_plugin
    usual, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = usual


@contextmanager
def building_operators() -> Iterator[None]:
    """Wraps the start of DeepSpeed, which compiles operators of its own. Raises `MissingExtra` if it cannot."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("failed to build/load", "Unable to JIT load")):
            raise
        raise MissingExtra(
            f"deepspeed: an operator of DeepSpeed cannot be compiled here ({str(error).splitlines()[0]})"
            " -> install ninja and a C++ compiler (and CUDA's for a GPU), or leave offload_optimizer out"
        ) from error


def count_steps_again(optimizer: Any) -> None:
    """Bring DeepSpeed's Adam on a CPU to where it was when the state that it has loaded was saved.

    It multiplies beta^t up from step to step, and computes a power where steps are left out, as after loading. The two
    differ in the last bit. So the steps are counted again, on a single number.
    """
    import torch

    inner: Any = getattr(optimizer, "optimizer", None)  # of the one that shards
    if type(inner).__name__ != "DeepSpeedCPUAdam":
        return
    groups = inner.param_groups
    num_steps = max((state.get("step", 0) for state in inner.state.values()), default=0)
    if any(group["betas"] != groups[0]["betas"] for group in groups):
        return  # it computes powers at every step then
    number = [torch.zeros(1) for _ in ("weight", "gradient", "mean", "variance")]
    settings = [groups[0][name] for name in ("eps", "weight_decay", "bias_correction")]
    for step in range(1, int(num_steps) + 1):
        inner.ds_opt_adam.adam_update(inner.opt_id, step, 0.0, *groups[0]["betas"], *settings, *number)


def engine_of(accelerator: "Accelerator") -> str:
    from accelerate.utils import DistributedType

    return {DistributedType.FSDP: FSDP, DistributedType.DEEPSPEED: DEEPSPEED}.get(accelerator.distributed_type, DDP)


def require_same_engine(checkpoint: Path, accelerator: "Accelerator") -> None:
    """Raises `OutputError` if this run cannot take the optimizer state from a checkpoint, which another engine or
    another number of processes has saved."""
    saved, num_saved = saved_by(checkpoint)
    now = engine_of(accelerator)
    if saved != now:
        raise OutputError(
            f"{checkpoint}: it was saved with {saved}, and this run trains with {now}"
            " -> resume with the engine that it was saved with, or start from its weights"
        )
    if num_saved is not None and num_saved != accelerator.num_processes:
        raise OutputError(
            f"{checkpoint}: DeepSpeed has saved it from {num_saved} processes and cannot share its state among"
            f" {accelerator.num_processes} -> resume with {num_saved} processes"
        )


def saved_by(checkpoint: Path) -> tuple[str, int | None]:
    """(engine, number of processes if the files are for that number only)."""
    if any(checkpoint.glob("global_step*")):
        return DEEPSPEED, len(list(checkpoint.glob(f"global_step*/{_SHARDS}"))) or None
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return FSDP, None
    return DDP, None


def require_one_start(resume_from: Path | None, all_found: Iterable[str]) -> None:
    """Raises `OutputError` if the processes of a run, which may not share a disk, would resume from other checkpoints.

    `all_found`: `resume_from` of each process as text.
    """
    found = sorted(set(all_found))
    if found != [str(resume_from)]:
        raise OutputError(
            f"the processes of this run found different checkpoints ({', '.join(found)})"
            " -> use an output_dir that all machines share, or resume_from_checkpoint with one that all of them have"
        )


def is_plain_sgd(optimizer: Any) -> bool:
    """SGD without momentum has no state, and torch cannot load what it saves of that for sharded weights
    (`Expected device to be set`)."""
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim import SGD

    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return isinstance(inner, SGD) and not any(group["momentum"] for group in inner.param_groups)


def load_schedule(checkpoint: Path, optimizer: Any, schedule: Any) -> None:
    """The learning rates of a checkpoint, without the optimizer; nothing of one that holds weights only."""
    import torch

    saved = checkpoint / "scheduler.pt"
    if not saved.is_file():
        return
    schedule.load_state_dict(torch.load(saved, weights_only=True))
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
