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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luthier.model.kernels.swiglu import Activation, gated, gated_backward

Weight = Tensor | Callable[[], Tensor]
"""W, or what dequantizes it. It is dequantized in the forward and in the backward pass, and not kept between them."""


class LoraLinear(torch.autograd.Function):
    """All tensors have the number format that is computed in. With `up`, `x` is g."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        activation: Activation | None,
        weight: Weight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        """x and up (N, I), weight (O, I), bias (O), a (r, I), b (O, r) -> (N, O)."""
        inputs = x if up is None or activation is None else gated(x, up, activation)
        low = inputs @ a.T
        kept = keep_weight(ctx, weight)
        matrix = weight_of(ctx, kept)
        y = inputs @ matrix.T if bias is None else torch.addmm(bias, inputs, matrix.T)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, up, kept, a, b, low)
        ctx.activation, ctx.scaling = activation, scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, weight, a, b, low = ctx.saved_tensors
        needs_x, needs_up, _, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        d_low = (dy @ b).mul_(ctx.scaling)
        dx = (dy @ weight_of(ctx, weight)).addmm_(d_low, a) if needs_x or needs_up else None
        db = (dy.T @ low).mul_(ctx.scaling) if needs_b else None
        if up is None:
            return dx, None, None, None, None, d_low.T @ x if needs_a else None, db, None
        acted = ctx.activation.apply(x)
        da = d_low.T @ (acted * up) if needs_a else None
        dg, du = (None, None) if dx is None else gated_backward(dx, x, up, acted, ctx.activation)
        return dg, du, None, None, None, da, db, None


def keep_weight(ctx: Any, weight: Weight) -> Tensor | None:
    """What of `weight` is for `save_for_backward`."""
    is_tensor = isinstance(weight, Tensor)
    ctx.dequantize = None if is_tensor else weight
    return weight if is_tensor else None  # type: ignore[return-value]


def weight_of(ctx: Any, kept: Tensor | None) -> Tensor:
    """W (O, I)"""
    weight: Tensor = ctx.dequantize() if kept is None else kept
    return weight
