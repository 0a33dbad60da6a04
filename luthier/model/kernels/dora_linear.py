"""A linear layer with DoRA as one operation, forward and backward (https://arxiv.org/abs/2402.09353, eq. 5).

    u  = x W^T + s (x A^T) B^T        y  = c * u + b        c = m / ||W + s B A||, the norm of each row
    du = dy * c        dx = du W + s (du B) A        dA = s (du B)^T x        dB = s du^T (x A^T)
    dc = sum over tokens of dy * u

As in section 4.3 of the paper the norm counts as a constant. peft forms B A by a product with an identity matrix of I
rows, and y from three tensors of its size.

N tokens, I inputs, O outputs, r rank. x is (N, I).
"""

from typing import Any

import torch
from torch import Tensor

from luthier.model.kernels.lora_linear import Weight, keep_weight, weight_of
from luthier.model.kernels.products import add_product, product


class DoraLinear(torch.autograd.Function):
    """All tensors have the number format that is computed in."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, c: Tensor, scaling: float
    ) -> Tensor:
        """x (N, I), weight (O, I), bias (O), a (r, I), b (O, r), c (O) -> (N, O)."""
        kept = keep_weight(ctx, weight)
        low = product(x, a)
        u = add_product(product(x, weight_of(ctx, kept)), low, b, scaling)
        ctx.save_for_backward(x, kept, a, b, c, low, u)
        ctx.scaling = scaling
        return u * c if bias is None else torch.addcmul(bias, u, c)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, c, low, u = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_c, _ = ctx.needs_input_grad
        du = dy * c
        d_low = product(du, b.T).mul_(ctx.scaling)
        dx = add_product(product(du, weight_of(ctx, weight).T), d_low, a.T) if needs_x else None
        da = product(d_low.T, x.T) if needs_a else None
        db = product(low.T, du.T).T.mul_(ctx.scaling) if needs_b else None
        dc = (dy * u).sum(0) if needs_c else None
        return dx, None, None, da, db, dc, None


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """||W + s B A||, (O,), in float32 or wider."""
    wide, a, b = (one.detach().to(torch.promote_types(one.dtype, torch.float32)) for one in (weight, a, b))
    return torch.linalg.vector_norm(torch.addmm(wide, b, a, alpha=scaling), dim=1)
