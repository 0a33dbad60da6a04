"""peft's LoRA layers that compute with `lora_linear` or `dora_linear` instead of peft's own forward.

Their base is a plain linear layer, or one of 4 bits of bitsandbytes or of any bits of HQQ.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.dtype import computed_in
from luthier.model.kernels.dora_linear import DoraLinear, row_norms
from luthier.model.kernels.lora_copies import Copies, has_one_adapter, learned_by
from luthier.model.kernels.lora_linear import Weight, factors_of, lora_linear
from luthier.model.kernels.plain_linear import has_own_products, is_plain, takes_own_product, unread_linear
from luthier.model.kernels.swiglu import Activation, GatedProduct, gated
from luthier.model.modules import unwrap

LAYERS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.hqq", "HqqLoraLinear"),
}
BNB, HQQ = ("bitsandbytes.nn.modules", "Linear4bit"), ("hqq.core.quantize", "HQQLinear")
"""By name, since the libraries need not be installed."""
BASES = {("torch.nn.modules.linear", "Linear"), BNB, HQQ}
DORA = ("peft.tuners.lora.variants", "DoraLinearVariant")


class FusedLora:
    """The `forward` of a LoRA layer."""

    def __init__(self, layer: Any, copies: Copies) -> None:
        self.layer, self.copies = layer, copies
        self.ready: tuple[Tensor, Tensor] | None = None
        """An input, and what the layer gives for it, if `computed_together` knows that."""

    def __call__(self, x: Tensor, *args: Any, **given: Any) -> Any:
        if self.ready is not None and self.ready[0] is x:
            (_, y), self.ready = self.ready, None
            return y
        outputs = None if args or given else _computed(self.copies, [self.layer], x)
        return type(self.layer).forward(self.layer, x, *args, **given) if outputs is None else outputs[0]


def fuse_lora(model: nn.Module, groups: Iterable[Sequence[nn.Module]] = ()) -> int:
    """Let the LoRA layers of a peft model compute as the kernels do. Returns how many do.

    Layers with dropout, a variant other than DoRA, a bias of the adapter, or a base that is trained or of another kind
    compute as peft does. So does every layer while it is disabled or merged. `groups`: layers that are given the same
    input, to `project` or `computed_together`.
    """
    layers: list[Any] = [module for module in model.modules() if _class_of(module) in LAYERS and can_be_fused(module)]
    plain = {layer: None for layer in layers if dora_of(layer) is None}
    together = [list(group) for group in groups if all(layer in plain for layer in group)]
    grouped = {layer for group in together for layer in group}
    copies = Copies(together + [[layer] for layer in plain if layer not in grouped], _is_on)
    if plain:
        copies.attach(unwrap(model))
    for layer in layers:
        layer.forward = FusedLora(layer, copies)
    return len(layers)


def project(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """What each of `layers` gives for x (..., I), in one operation if all are fused."""
    outputs = _computed(_copies_of(layers), layers, x) if all(map(_may_skip_call, layers)) else None
    return [layer(x) for layer in layers] if outputs is None else outputs


@contextlib.contextmanager
def computed_together(layers: Sequence[Any], x: Tensor | None) -> Iterator[None]:
    """While open, each of `layers` is asked for x, by code that is not ours."""
    outputs = None
    if x is not None and layers and all(map(_is_fused, layers)):
        outputs = _computed(_copies_of(layers), layers, x)
    if outputs is None:
        yield
        return
    for layer, y in zip(layers, outputs, strict=True):
        layer.forward.ready = (x, y)
    try:
        yield
    finally:
        for layer in layers:
            layer.forward.ready = None


def project_gated(
    layer: Any,
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    *,
    is_read: bool = True,
    keeps_the_same: bool = False,
) -> Tensor:
    """`layer` applied to act(gate) * up. gate, up (..., I) of one format -> (..., O).

    With `is_read` false the gradients alone are right, if the numbers take a product of their own. `keeps_the_same`:
    what is kept for the backward pass is then the same as with the product.
    """
    if not torch.is_grad_enabled():
        answer: Tensor = layer(gated(gate, up, activation))
        return answer
    if _may_skip_call(layer) and computed_in(gate) == gate.dtype:
        outputs = _computed(_copies_of([layer]), [layer], gate, up, activation, is_read=is_read)
        if outputs is not None:
            return outputs[0]
    inputs: Tensor = GatedProduct.apply(gate, up, activation)
    may_differ = not keeps_the_same or takes_own_product(layer, inputs)
    if not is_read and may_differ and is_plain(layer) and not has_hooks(layer):
        return unread_linear(inputs, layer)
    projected: Tensor = layer(inputs)
    return projected


def _is_fused(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), FusedLora)


def _may_skip_call(layer: nn.Module) -> bool:
    return _is_fused(layer) and not has_hooks(layer)


def _is_on(layer: Any) -> bool:
    return not layer.disable_adapters and not layer.merged and can_be_fused(layer)


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


def _copies_of(fused: Sequence[Any]) -> Copies:
    copies: Copies = fused[0].forward.copies
    return copies


def _computed(
    copies: Copies,
    layers: Sequence[Any],
    x: Tensor,
    up: Tensor | None = None,
    activation: Activation | None = None,
    *,
    is_read: bool = True,
) -> list[Tensor] | None:
    """x (..., I) -> (..., O_i) of each of some layers without DoRA, or of a single layer. None if the kernels cannot
    compute that now."""
    dtype, prepared = computed_in(x), copies.of(layers)
    if prepared is None or prepared.dtype != dtype:
        if not all(map(_is_on, layers)):
            return None
        prepared = None
    if not all(_can_multiply(layer, x) for layer in layers):
        return None
    inputs = x.flatten(0, -2).to(dtype)
    other = None if up is None else up.flatten(0, -2).to(dtype)
    bases = [layer.base_layer for layer in layers]
    weights = [_weight_of(base, dtype) for base in bases]
    biases = [None if base.bias is None else base.bias.to(dtype) for base in bases]
    if prepared is not None:
        learned, factors = prepared.learned, prepared.factors
    elif all(dora_of(layer) is None for layer in layers):
        learned = learned_by(layers)
        factors = factors_of(learned.a, learned.b, learned.scalings, dtype)
    elif len(layers) > 1 or up is not None:
        return None
    else:
        found = _dora_linear(layers[0], inputs, weights[0], biases[0], dtype)
        return [found.view(*x.shape[:-1], found.shape[-1])]
    outputs = lora_linear(inputs, weights, biases, factors, learned.tensors, other, activation, is_read=is_read)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _dora_linear(layer: Any, x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    dora: Any = dora_of(layer)
    learned = learned_by([layer])
    (a, b), (scaling,) = learned.tensors, learned.scalings
    with torch.no_grad(), torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        norms = row_norms(weight if isinstance(weight, Tensor) else weight(), a, b, scaling)
    y: Tensor = DoraLinear.apply(x, weight, bias, a.to(dtype), b.to(dtype), (dora.weight / norms).to(dtype), scaling)
    return y


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
    if not has_one_adapter(layer) or layer.fan_in_fan_out:
        return False
    if names[0] in layer.lora_variant and _class_of(layer.lora_variant[names[0]]) != DORA:
        return False
    base: Any = layer.base_layer
    a, b, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    if layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        return False
    if _class_of(base) not in BASES or any(type(part) is not nn.Linear for part in (a, b)):
        return False
    if any(("forward" in vars(part) and not has_own_products(part)) or has_hooks(part) for part in (base, a, b)):
        return False
    return a.bias is None and b.bias is None and not any(one.requires_grad for one in base.parameters())


def _class_of(module: object) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
