"""RMSNorm as one operation, forward and backward (https://arxiv.org/abs/1910.07467).

    r  = (mean(x^2) + eps)^(-1/2)        y = w * x * r
    dx = r g - x r^3 mean(g * x)         dw = sum over tokens of dy * x * r,       with g = dy * w

x is normalized in float32. Where autograd keeps copies of x between these steps, here only x itself and r are kept.

On a GPU, PyTorch has one kernel for each direction. On an H200, forward and backward of 4,096 x 2,048 numbers take the
CPU 0.10 ms to start instead of 0.72, and the GPU waits for the CPU.

x, y: (..., D), r: (..., 1), w: (D,).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm


@dataclass(frozen=True, slots=True)
class Form:
    """In what models differ. w = 1 + weight if `adds_one`. `rounds_last`: x r w is rounded to the format of x, instead
    of x r, which is then multiplied with w."""

    adds_one: bool
    rounds_last: bool


FORMS = (Form(False, False), Form(False, True), Form(True, True))
"""Llama, OLMo 2, Gemma."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
    """y"""
    y: Tensor
    if has_kernel(x, weight) and not form.adds_one:
        # `torch.rms_norm` calls it too, but autocast lets that compute in float32. It rounds last, whatever the form.
        y, _ = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
    else:
        y = RmsNorm.apply(x, weight, eps, form)
    return y


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch computes this in one kernel: since PyTorch 2.9, and with a weight of the same format."""
    return x.is_cuda and x.dtype == weight.dtype and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


class RmsNorm(torch.autograd.Function):
    """Apply it to (x, weight, eps, form)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
        wide = _widened(x)
        r = (vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.form = form
        normed = wide * r if wide is x else wide.mul_(r)
        if form.rounds_last:
            return normed.mul_(_factor(weight, form)).to(x.dtype)
        normed = normed.to(x.dtype)
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, r = ctx.saved_tensors
        wide, dy = _widened(x), _widened(dy)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * wide).mul_(r).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dw, None, None
        g = dy * _factor(weight, ctx.form)
        share = (g * wide).sum(-1, keepdim=True).mul_(r**3).div_(-x.shape[-1])
        return g.mul_(r).addcmul_(wide, share).to(x.dtype), dw, None, None


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _factor(weight: Tensor, form: Form) -> Tensor:
    """w"""
    return _widened(weight) + 1 if form.adds_one else _widened(weight)
