"""Weights that FSDP 2 or DeepSpeed ZeRO-3 has spread over the processes of a run: made whole for a while, and exchanged
for others.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import inspect
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


def is_sharded_by_zero(model: "nn.Module") -> bool:
    """DeepSpeed numbers the parameters that it takes apart."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def is_sharded(model: "nn.Module") -> bool:
    return bool(sharded_modules(model)) or is_sharded_by_zero(model)


@contextmanager
def whole_weights(model: "nn.Module") -> Iterator[None]:
    """While open, every process holds all weights of `model`, so each may run it as often as it likes, without
    gradients. All processes open and close it together. Nothing happens to a model whose weights are whole.

    Both engines gather the weights of a layer whenever the layer runs, which all processes must do equally often.
    Sampled answers differ in length, so the weights are gathered once.
    """
    modules = sharded_modules(model)
    if modules:
        with _whole_of_fsdp(model, modules):
            yield
    elif is_sharded_by_zero(model):
        import deepspeed

        reshard(model)
        with deepspeed.zero.GatheredParameters(list(model.parameters())), _without_hooks_of_zero(model):
            yield
    else:
        yield


@contextmanager
def _without_hooks_of_zero(model: "nn.Module") -> Iterator[None]:
    """While open, no layer gathers its weights before its forward pass or takes them apart after it."""
    removed: list[tuple[Any, dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(str(hook.__module__).startswith("deepspeed.") for hook in hooks.values()):
                removed.append((hooks, dict(hooks)))
    try:
        for hooks, before in removed:
            for key, hook in before.items():
                if str(hook.__module__).startswith("deepspeed."):
                    del hooks[key]
        yield
    finally:
        for hooks, before in removed:
            hooks.clear()
            hooks.update(before)


@contextmanager
def _whole_of_fsdp(model: "nn.Module", modules: "list[Any]") -> Iterator[None]:
    import torch

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
    for hook in list(model._forward_pre_hooks.values()):
        if _starts_a_step_of_zero(hook):
            hook(model)  # waits for the weights that DeepSpeed gathers for layers ahead, and frees them


def _starts_a_step_of_zero(hook: Any) -> bool:
    """DeepSpeed has no public name for it, and wraps it for its profiler."""
    wrapped = inspect.getclosurevars(hook).nonlocals.get("func", hook) if inspect.isfunction(hook) else hook
    return getattr(wrapped, "__name__", "") == "_start_of_forward_hook"


def _is_freed(module: Any) -> bool:
    """Whether the weights of the module are freed after its forward pass. FSDP 2 has no public name for it."""
    return any(group._reshard_after_forward for group in param_groups(module._get_fsdp_state()))


def param_groups(state: Any) -> "list[Any]":
    """The groups of weights of a module that FSDP 2 gathers. Up to PyTorch 2.11 a module has one at most."""
    named = vars(state)
    if "_fsdp_param_groups" in named:
        return list(named["_fsdp_param_groups"])
    return [] if named["_fsdp_param_group"] is None else [named["_fsdp_param_group"]]


def exchange(weight: "Tensor", other: "Tensor") -> "Tensor":
    """Give `weight`, which is sharded, the numbers of `other`, a whole tensor or one that is sharded alike. Returns
    what it had before. All processes call it together."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            before = weight.detach().clone()
            weight.copy_(other)
        return before
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
    if is_sharded_by_zero(model):
        reshard(model)
        return _gathered_from_zero(model, keeps=keeps, only_trained=only_trained)
    reshard(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if only_trained and name not in trained:
            continue
        whole: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keeps:
            found[name] = whole.detach().cpu()
    return found


def _gathered_from_zero(model: "nn.Module", *, keeps: bool, only_trained: bool) -> "dict[str, Tensor]":
    import deepspeed

    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if only_trained and not weight.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([weight]):
            if keeps:
                found[name] = weight.detach().cpu().clone()
    if keeps and not only_trained:
        found |= {
            name: tensor.cpu() for name, tensor in model.state_dict().items() if tensor.numel() and name not in found
        }
    return found
