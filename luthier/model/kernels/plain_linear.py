"""Linear layers without an adapter, whose products are those of `luthier.model.kernels.products`.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum over tokens of dy

N tokens, I inputs, O outputs. x is (..., I) and becomes (N, I).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from luthier.model.dtype import computed_in
from luthier.model.kernels.products import (
    has_half_kernel,
    is_better_here,
    is_faster,
    is_slow,
    product,
    usual_product,
)
from luthier.model.kernels.varlen import HALVES

LEAST_WEIGHTS = 2**16
"""Of a layer whose products are worth it for a few hundred tokens."""


class PlainForward:
    """The `forward` of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if not self.is_faster_for(x):
            return linear(x, weight, bias)
        dtype = computed_in(x)
        own_bias = None if bias is None else bias.to(dtype)
        y: Tensor = PlainLinear.apply(x.flatten(0, -2).to(dtype), weight.to(dtype), own_bias, True)
        return y.view(*x.shape[:-1], y.shape[-1])

    def is_faster_for(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or x.ndim < 2:
            return False
        rows, weight = x.flatten(0, -2), self.layer.weight
        return is_faster(rows, weight) or is_slow(rows, weight, computed_in(x))


class PlainLinear(torch.autograd.Function):
    """x (N, I), weight (O, I), bias (O) or None -> (N, O), all of one format on a CPU.

    With `is_read` false the output has any numbers, the gradients are right, and formats and devices are free.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_read: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias) if is_read else x.new_empty(len(x), len(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = product(dy, weight.T) if needs_x else None
        return dx, usual_product(dy.T, x.T) if needs_weight else None, dy.sum(0) if needs_bias else None, None


def unread_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x (..., I) -> (..., O): any numbers, with the gradients of `layer`, which `is_plain`."""
    dtype = computed_in(x)
    weight, bias = layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    y: Tensor = PlainLinear.apply(x.flatten(0, -2).to(dtype), weight, bias, False)
    return y.view(*x.shape[:-1], y.shape[-1])


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a linear layer of PyTorch with an ordinary weight, and no other library has changed its code."""
    is_own = "forward" not in vars(layer) or has_own_products(layer)
    return type(layer) is nn.Linear and is_own and type(layer.weight) is nn.Parameter


def has_own_products(layer: nn.Module) -> bool:
    """Whether `fuse_plain` has changed this layer, which computes the same as before."""
    return isinstance(vars(layer).get("forward"), PlainForward)


def takes_own_product(layer: nn.Module, x: Tensor) -> bool:
    """Whether this layer computes x with `PlainLinear` now."""
    own = vars(layer).get("forward")
    return isinstance(own, PlainForward) and own.is_faster_for(x)


def fuse_plain(model: nn.Module) -> None:
    """Let the linear layers of `model` compute so where that is faster."""
    if not is_better_here() and has_half_kernel(torch.bfloat16):
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and _may_be_faster(module.weight):
            module.forward = PlainForward(module)  # type: ignore[method-assign,assignment]


def _may_be_faster(weight: Tensor) -> bool:
    is_fit = weight.dtype in (torch.float32, *HALVES) and weight.device.type == "cpu"
    return is_fit and type(weight) is nn.Parameter and weight.numel() >= LEAST_WEIGHTS
