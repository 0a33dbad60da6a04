"""LoRA layers of a model that answers in the middle of its training.

A LoRA layer of training (`luthier.model.kernels.lora_layers`) checks at each call whether it may be fused, and prepares
for gradients. For the few rows of a decoding step that takes longer than its products. While a model answers, neither
the weights nor the layers change, so this is decided once. The sums are the same ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from luthier.core.importing import is_loaded
from luthier.model.dtype import computed_in
from luthier.model.kernels.lora_layers import can_be_fused, dora_of

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from transformers import PreTrainedModel


@contextmanager
def lean_layers(model: "PreTrainedModel") -> Iterator[None]:
    """A context in which `model`, in evaluation mode and without gradients, computes small batches faster."""
    layers = [layer for layer in _lora_layers(model) if _is_fused(layer)]
    fused = [vars(layer)["forward"] for layer in layers]
    for layer, forward in zip(layers, fused, strict=True):
        layer.forward = _lean(layer, forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(layers, fused, strict=True):
            layer.forward = forward  # type: ignore[method-assign]


def _lora_layers(model: "PreTrainedModel") -> "list[LoraLinear]":
    if not is_loaded("peft"):
        return []
    from peft.tuners.lora.layer import Linear as LoraLinear

    return [layer for layer in model.modules() if type(layer) is LoraLinear]


def _is_fused(layer: "LoraLinear") -> bool:
    if "forward" not in vars(layer) or layer.disable_adapters or layer.merged or not can_be_fused(layer):
        return False
    return type(layer.base_layer) is nn.Linear and dora_of(layer) is None


def _lean(layer: "LoraLinear", fused: Any) -> Any:
    """The forward pass of a layer; `fused`: the one for training, which also does the number formats of autocast."""
    base: Any = layer.base_layer
    (name,) = layer.active_adapters
    a: Any = layer.lora_A[name].weight
    b: Any = layer.lora_B[name].weight
    if not a.dtype == b.dtype == base.weight.dtype:
        return fused
    return partial(_forward, fused, base, a.T, b.T, layer.scaling[name])


def _forward(
    fused: Any,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    scaling: float,
    x: Tensor,
    *args: Any,
    **given: Any,
) -> Tensor:
    """x (..., I), base I -> O, a (I, r), b (r, O) -> (..., O)."""
    if args or given or not computed_in(x) == x.dtype == a.dtype:
        return fused(x, *args, **given)
    rows = x.flatten(0, -2)
    y = base(rows).addmm_(rows @ a, b, alpha=scaling)
    return y.view(*x.shape[:-1], y.shape[-1])
