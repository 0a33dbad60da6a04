"""Weights that FSDP 2 has spread over the processes of a run: made whole for a while, and exchanged for others.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def sharded_modules(model: "nn.Module") -> "list[Any]":
    """The modules that FSDP 2 gathers one by one; none in a model whose weights are whole."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole_weights(model: "nn.Module") -> Iterator[None]:
    """While open, every process holds all weights of `model`, so each may run it as often as it likes, without
    gradients. All processes open and close it together. Nothing happens to a model whose weights are whole.

    FSDP gathers the weights of a layer whenever the layer runs, which all processes must do equally often. Sampled
    answers differ in length, so the weights are gathered once.
    """
    import torch

    modules = sharded_modules(model)
    if not modules:
        yield
        return
    was_training = model.training
    model.eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)  # FSDP prepares itself in the first forward pass of all
        freed = [module for module in modules if _is_freed(module)]
        try:
            for module in modules:
                if module in freed:
                    module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            model.train(was_training)
            for module in freed:
                module.set_reshard_after_forward(True, recurse=False)
            reshard(model)


def reshard(model: "nn.Module") -> None:
    """Free gathered weights, which are copies: the shards are what an optimizer or `exchange` changes."""
    for module in sharded_modules(model):
        module.reshard()


def _is_freed(module: Any) -> bool:
    """Whether the weights of the module are freed after its forward pass. FSDP 2 has no public name for it."""
    return any(group._reshard_after_forward for group in module._get_fsdp_state()._fsdp_param_groups)


def exchange(weight: "Tensor", other: "Tensor") -> "Tensor":
    """Give `weight`, which is sharded, the numbers of `other`, a whole tensor or one that is sharded alike. Returns what
    it had before."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(weight, DTensor)
    if not isinstance(other, DTensor):
        other = distribute_tensor(other.to(weight.device), weight.device_mesh, weight.placements)
    with torch.no_grad():
        before = weight.detach().clone()
        weight.to_local().copy_(other.to_local())
    return before


def gathered(model: "nn.Module", *, keeps: bool, only_trained: bool = False) -> "dict[str, Tensor]":
    """The whole weights on the CPU, one gathered after the other; all processes call it together. Empty where this
    process does not keep them. `only_trained`: those that are trained."""
    is_sharded = bool(sharded_modules(model))
    reshard(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if only_trained and name not in trained:
            continue
        whole: Any = tensor
        if is_sharded and hasattr(tensor, "full_tensor"):
            whole = tensor.full_tensor()
        if keeps:
            found[name] = whole.detach().cpu()
    return found
