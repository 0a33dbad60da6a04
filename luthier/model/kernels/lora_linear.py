"""A linear layer with LoRA as one operation, forward and backward.

    y  = x W^T + b + s (x A^T) B^T
    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

peft computes these equations (https://arxiv.org/abs/2106.09685, eq. 3) as separate layers: it scales and adds tensors
of the size of y and dx in passes of their own, and under autocast it turns x into float32 and back. Here the products
with A and B add to what the products with W have written.

N tokens, I inputs, O outputs, r rank. x is (..., I) and becomes (N, I).
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    """All tensors have the number format that is computed in."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """x (N, I), weight (O, I), bias (O), a (r, I), b (O, r) -> (N, O)."""
        low = x @ a.T
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        d_low = (dy @ b).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(d_low, a) if needs_x else None
        da = d_low.T @ x if needs_a else None
        db = (dy.T @ low).mul_(ctx.scaling) if needs_b else None
        return dx, None, None, da, db, None


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of a peft model compute as above. Returns how many do.

    Layers with dropout, DoRA or another variant, a bias of the adapter, or a base that is more than a plain frozen
    linear layer compute as peft does. So does every layer while it is disabled or merged.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear and can_be_fused(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: LoraLinear, x: Tensor, *args: Any, **given: Any) -> Tensor:
    if args or given or layer.disable_adapters or layer.merged or not can_be_fused(layer):
        return LoraLinear.forward(layer, x, *args, **given)
    base: Any = layer.base_layer
    (name,) = layer.active_adapters
    weights = (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
    device = "cpu" if x.is_meta else x.device.type  # tensors without data, of a plan, have no autocast of their own
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weight, bias, a, b = (one if one is None else one.to(dtype) for one in weights)
    with torch.autocast(device, enabled=False):
        y: Any = _LoraLinear.apply(x.flatten(0, -2).to(dtype), weight, bias, a, b, layer.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])


def can_be_fused(layer: LoraLinear) -> bool:
    """Asked at each call, since hooks of other libraries (sharding, offloading) come and go."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant or layer.fan_in_fan_out:
        return False
    base: Any = layer.base_layer
    a, b, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    if layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        return False
    parts = (base, a, b)
    if any(type(part) is not nn.Linear or "forward" in vars(part) or _has_hooks(part) for part in parts):
        return False
    frozen = [one for one in (base.weight, base.bias) if one is not None]
    return a.bias is None and b.bias is None and not any(one.requires_grad for one in frozen)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
