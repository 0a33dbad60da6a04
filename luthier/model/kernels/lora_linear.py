"""A linear layer with LoRA as one operation, forward and backward.

    y  = x W^T + b + s (x A^T) B^T
    dx = dy W + s (dy B) A        dA = s (dy B)^T x        dB = s dy^T (x A^T)

peft computes these equations (https://arxiv.org/abs/2106.09685, eq. 3) as separate layers: it scales and adds tensors
of the size of y and dx in passes of their own, and under autocast it turns x into float32 and back. Here the products
with A and B add to what the products with W have written.

In an MLP, x of the last layer is act(g) * u (`luthier.model.kernels.swiglu`). It is not kept, but computed again in the
backward pass.

N tokens, I inputs, O outputs, r rank. x is (..., I) and becomes (N, I).
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from luthier.model.kernels.swiglu import Activation, GatedProduct, gated, gated_backward


class _LoraLinear(torch.autograd.Function):
    """All tensors have the number format that is computed in. With `up`, `x` is g."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        activation: Activation | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        """x and up (N, I), weight (O, I), bias (O), a (r, I), b (O, r) -> (N, O)."""
        inputs = x if up is None or activation is None else gated(x, up, activation)
        low = inputs @ a.T
        y = inputs @ weight.T if bias is None else torch.addmm(bias, inputs, weight.T)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, up, weight, a, b, low)
        ctx.activation, ctx.scaling = activation, scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, weight, a, b, low = ctx.saved_tensors
        needs_x, needs_up, _, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        d_low = (dy @ b).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(d_low, a) if needs_x or needs_up else None
        db = (dy.T @ low).mul_(ctx.scaling) if needs_b else None
        if up is None:
            return dx, None, None, None, None, d_low.T @ x if needs_a else None, db, None
        acted = ctx.activation.apply(x)
        da = d_low.T @ (acted * up) if needs_a else None
        dg, du = (None, None) if dx is None else gated_backward(dx, x, up, acted, ctx.activation)
        return dg, du, None, None, None, da, db, None


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of a peft model compute as above. Returns how many do.

    Layers with dropout, DoRA or another variant, a bias of the adapter, or a base that is more than a plain frozen
    linear layer compute as peft does. So does every layer while it is disabled or merged.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear and _can_be_fused(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def project_gated(layer: nn.Module, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`layer` applied to act(gate) * up. gate, up (..., I) of one format -> (..., O)."""
    is_fused = isinstance(layer, LoraLinear) and "forward" in vars(layer) and _is_active(layer)
    if is_fused and not _has_hooks(layer) and _compute_dtype(gate) == gate.dtype:
        return _apply(layer, gate, up, activation)
    projected: Tensor = layer(GatedProduct.apply(gate, up, activation))
    return projected


def _forward(layer: LoraLinear, x: Tensor, *args: Any, **given: Any) -> Tensor:
    if args or given or not _is_active(layer):
        return LoraLinear.forward(layer, x, *args, **given)
    return _apply(layer, x)


def _is_active(layer: Any) -> bool:
    return not layer.disable_adapters and not layer.merged and _can_be_fused(layer)


def _apply(layer: Any, x: Tensor, up: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    base: Any = layer.base_layer
    (name,) = layer.active_adapters
    weights = (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
    dtype = _compute_dtype(x)
    weight, bias, a, b = (one if one is None else one.to(dtype) for one in weights)
    inputs, other = (one if one is None else one.flatten(0, -2).to(dtype) for one in (x, up))
    with torch.autocast(_device_type(x), enabled=False):
        y: Any = _LoraLinear.apply(inputs, other, activation, weight, bias, a, b, layer.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])


def _device_type(x: Tensor) -> str:
    """Tensors without data, of a plan, have no autocast of their own."""
    return "cpu" if x.is_meta else x.device.type


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = _device_type(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _can_be_fused(layer: LoraLinear) -> bool:
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
