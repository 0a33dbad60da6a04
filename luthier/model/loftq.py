"""LoftQ: LoRA that starts by making good what quantisation took from a weight (https://arxiv.org/abs/2310.08659).

With Q the quantised weight, s B A is the best product of rank r for W - Q: algorithm 1 with one round, so Q is what any
program makes of W, and the adapter can be loaded on it anywhere.

Shapes: W, Q (out, in), A (r, in), B (out, r).
"""

from typing import TYPE_CHECKING, Any

from luthier.core.log import info
from luthier.model.quantization import is_quantised_linear

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

NUM_ITERATIONS = 16
"""Of the fast decomposition (https://arxiv.org/abs/0909.4061)."""


def start_from_quantisation_error(adapted: "PeftModel", original: "PreTrainedModel") -> None:
    """Set A and B of every quantised layer; `original` is the model with its weights as they were."""
    import torch
    from peft.tuners.lora import LoraLayer

    before = after = 0.0
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or not is_quantised_linear(module.get_base_layer()):
            continue
        layer: Any = module
        factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight: Tensor = original.get_parameter(f"{name}.weight").detach()
        lost = weight.float().to(factor_a.device) - computed_weight(layer.get_base_layer())
        rank = layer.r["default"]
        left, values, right = torch.svd_lowrank(lost, min(rank, *lost.shape), niter=NUM_ITERATIONS)
        roots = (values / layer.scaling["default"]).sqrt()
        with torch.no_grad():
            factor_a[: len(roots)] = (roots[:, None] * right.T).to(factor_a.dtype)
            factor_b[:, : len(roots)] = (left * roots).to(factor_b.dtype)
            left_over = lost - layer.scaling["default"] * (factor_b.float() @ factor_a.float())
        before, after = before + float(lost.square().sum()), after + float(left_over.square().sum())
    share = 1 - (after / before) ** 0.5 if before else 0.0
    info(f"loftq_init: the adapter starts by making good {share:.1%} of the error of quantisation")


def computed_weight(layer: Any) -> "Tensor":
    """(out, in) in float32: what the layer makes of each unit vector, whatever it holds its weight in."""
    import torch

    device = next(iter((*layer.parameters(), *layer.buffers()))).device
    with torch.no_grad():
        weight: Tensor = layer(torch.eye(layer.in_features, device=device)).float().T
        return weight if layer.bias is None else weight - layer.bias.float()[:, None]
