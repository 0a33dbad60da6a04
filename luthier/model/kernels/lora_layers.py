"""peft's LoRA layers that compute with `lora_linear` or `dora_linear` instead of peft's own forward.

Their base is a plain linear layer, or one of 4 bits of bitsandbytes or of any bits of HQQ.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.dtype import computed_in
from luthier.model.kernels.dora_linear import DoraLinear, row_norms
from luthier.model.kernels.lora_linear import LoraLinear, Weight
from luthier.model.kernels.swiglu import Activation, GatedProduct, gated

LAYERS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.hqq", "HqqLoraLinear"),
}
BNB, HQQ = ("bitsandbytes.nn.modules", "Linear4bit"), ("hqq.core.quantize", "HQQLinear")
"""By name, since the libraries need not be installed."""
BASES = {("torch.nn.modules.linear", "Linear"), BNB, HQQ}
DORA = ("peft.tuners.lora.variants", "DoraLinearVariant")


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of a peft model compute as the kernels do. Returns how many do.

    Layers with dropout, a variant other than DoRA, a bias of the adapter, or a base that is trained or of another kind
    compute as peft does. So does every layer while it is disabled or merged.
    """
    layers = [module for module in model.modules() if _class_of(module) in LAYERS and can_be_fused(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)


def project_gated(layer: nn.Module, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`layer` applied to act(gate) * up. gate, up (..., I) of one format -> (..., O)."""
    if not torch.is_grad_enabled():
        answer: Tensor = layer(gated(gate, up, activation))
        return answer
    is_fused = _class_of(layer) in LAYERS and "forward" in vars(layer) and not _has_hooks(layer)
    if is_fused and _is_active(layer, gate) and dora_of(layer) is None and computed_in(gate) == gate.dtype:
        return _apply(layer, gate, up, activation)
    projected: Tensor = layer(GatedProduct.apply(gate, up, activation))
    return projected


def _forward(layer: Any, x: Tensor, *args: Any, **given: Any) -> Tensor:
    if args or given or not _is_active(layer, x):
        result: Tensor = type(layer).forward(layer, x, *args, **given)
        return result
    return _apply(layer, x)


def _is_active(layer: Any, x: Tensor) -> bool:
    return not layer.disable_adapters and not layer.merged and can_be_fused(layer) and _can_multiply(layer, x)


def _can_multiply(layer: Any, x: Tensor) -> bool:
    """Without gradients a quantized base has kernels of its own, that need no dequantized weight.

    4-bit layers of bitsandbytes compute in a format of their own, and may be packed for generation.
    """
    base = layer.base_layer
    if type(base) is nn.Linear:
        return True
    if _class_of(base) == BNB:
        state = getattr(base.weight, "quant_state", None)  # FSDP keeps the weight alone
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return False
        if base.compute_dtype not in (None, computed_in(x)):
            return False
    return torch.is_grad_enabled()


def _apply(layer: Any, x: Tensor, up: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    base: Any = layer.base_layer
    (name,) = layer.active_adapters
    dtype, scaling = computed_in(x), layer.scaling[name]
    own = (base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
    bias, a, b = (one if one is None else one.to(dtype) for one in own)
    inputs, other = (one if one is None else one.flatten(0, -2).to(dtype) for one in (x, up))
    weight = _weight_of(base, dtype)
    dora: Any = dora_of(layer)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        if dora is None:
            y: Any = LoraLinear.apply(inputs, other, activation, weight, bias, a, b, scaling)
        else:
            with torch.no_grad():
                norms = row_norms(weight if isinstance(weight, Tensor) else weight(), *own[1:], scaling)
            y = DoraLinear.apply(inputs, weight, bias, a, b, (dora.weight / norms).to(dtype), scaling)
    return y.view(*x.shape[:-1], y.shape[-1])


def _weight_of(base: Any, dtype: torch.dtype) -> Weight:
    if type(base) is nn.Linear:
        return base.weight.to(dtype)
    dequantize: Callable[[], Tensor] = partial(_dequantized, base) if _class_of(base) == BNB else base.dequantize
    return lambda: dequantize().to(dtype)


def _dequantized(base: Any) -> Tensor:
    """Of a `Linear4bit`."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state)
    return weight


def dora_of(layer: Any) -> nn.Module | None:
    """peft's layer with the magnitudes; None without DoRA."""
    (name,) = layer.active_adapters
    return layer.lora_magnitude_vector[name] if name in layer.lora_variant else None


def can_be_fused(layer: Any) -> bool:
    """Asked at each call, since hooks of other libraries (sharding, offloading) come and go."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.fan_in_fan_out:
        return False
    if names[0] in layer.lora_variant and _class_of(layer.lora_variant[names[0]]) != DORA:
        return False
    base: Any = layer.base_layer
    a, b, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    if layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        return False
    if _class_of(base) not in BASES or any(type(part) is not nn.Linear for part in (a, b)):
        return False
    if any("forward" in vars(part) or _has_hooks(part) for part in (base, a, b)):
        return False
    return a.bias is None and b.bias is None and not any(one.requires_grad for one in base.parameters())


def _class_of(module: object) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
