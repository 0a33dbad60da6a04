"""Linear layers with LoRA that have the same input, as one operation, forward and backward.

    y_i  = x W_i^T + b_i + l_i B_i^T             l_i = x A_i^T
    dx   = sum over i of dy_i W_i + d_i A_i      d_i = dy_i B_i
    dA_i = d_i^T x                               dB_i = dy_i^T l_i, of which s_i counts for the weight B_i / s_i

peft computes these equations (https://arxiv.org/abs/2106.09685, eq. 3) as separate layers: it scales and adds tensors
of the size of y and dx in passes of their own, and under autocast it turns x into float32 and back. Here the products
with A and B add to what the products with W have written, B is scaled instead of the tokens, and the A_i are one matrix
A, so that all l_i are one product, and all dA_i. A GPU waits for the CPU to start kernels, so their number counts.

In an MLP, x of the last layer is act(g) * u (`luthier.model.kernels.swiglu`). It is not kept, but computed again in the
backward pass.

N tokens, I inputs, O outputs, r rank, R sum of the ranks. x is (..., I) and becomes (N, I).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.model.kernels.products import add_product, added_product, product, product_into
from luthier.model.kernels.swiglu import Activation, gated, gated_backward

Weight = Tensor | Callable[[], Tensor]
"""W, or what dequantizes it. It is dequantized in the forward and in the backward pass, and not kept between them."""


_NUM_GIVEN = 7
"""Arguments of `LoraLinear` before the weights that it learns."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B in the number format that is computed in."""

    a: Tensor
    """(R, I): the A_i, one below the other."""
    b: tuple[Tensor, ...]
    """(O_i, r_i), each times its s_i."""
    scalings: tuple[float, ...]

    @property
    def ranks(self) -> list[int]:
        return [b.shape[1] for b in self.b]


def factors_of(a: Sequence[Tensor], b: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Factors:
    """Of the weights a_i (r_i, I) and b_i (O_i, r_i).

    The columns of B_i are in memory one after the other: in float32 a CPU then takes a third of the time for dy_i B_i.
    """
    with torch.no_grad():
        stacked = a[0] if len(a) == 1 else torch.cat(tuple(a))
        scaled = (one.T.contiguous() * scaling for one, scaling in zip(b, scalings, strict=True))
        return Factors(stacked.to(dtype), tuple(one.to(dtype).T for one in scaled), tuple(scalings))


def lora_linear(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    factors: Factors,
    learned: Sequence[Tensor],
    up: Tensor | None = None,
    activation: Activation | None = None,
    *,
    is_read: bool = True,
) -> tuple[Tensor, ...]:
    """x and up (N, I), W_i (O_i, I), b_i (O_i) -> y_i (N, O_i).

    All have the number format that is computed in, except `learned`: the weights that `factors` were made of, a_1, ...,
    b_1, ..., which get the gradients. With `up`, `x` is g. With `is_read` false, y_i are any numbers, which saves the
    products with W_i, and the gradients are right.
    """
    outputs: tuple[Tensor, ...] = LoraLinear.apply(x, up, activation, weights, biases, factors, is_read, *learned)
    return outputs


class LoraLinear(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        activation: Activation | None,
        weights: Sequence[Weight],
        biases: Sequence[Tensor | None],
        factors: Factors,
        is_read: bool,
        *learned: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = x if up is None or activation is None else gated(x, up, activation)
        low = product(inputs, factors.a)
        outputs = [] if is_read else [inputs.new_empty(len(inputs), len(b)) for b in factors.b]
        parts = zip(weights, biases, _columns(low, factors.ranks), factors.b, strict=True) if is_read else ()
        for weight, bias, own_low, b in parts:
            matrix = weight if isinstance(weight, Tensor) else weight()
            outputs.append(add_product(product(inputs, matrix, bias), own_low, b))
        tensors = (weight if isinstance(weight, Tensor) else None for weight in weights)
        ctx.save_for_backward(x, up, low, factors.a, *factors.b, *tensors)
        ctx.dequantize = [None if isinstance(weight, Tensor) else weight for weight in weights]
        ctx.activation, ctx.scalings, ctx.format = activation, factors.scalings, learned[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        x, up, low, a, *others = ctx.saved_tensors
        b, kept = others[: len(dy)], others[len(dy) :]
        ranks = [one.shape[1] for one in b]
        needs = ctx.needs_input_grad
        d_low = torch.empty_like(low)
        for one, own_b, d in zip(dy, b, _columns(d_low, ranks), strict=True):
            product_into(d, one, own_b.T)
        dx = None
        if needs[0] or needs[1]:
            matrices = (weight if make is None else make() for weight, make in zip(kept, ctx.dequantize, strict=True))
            dx = product(dy[0], next(matrices).T)
            for one, matrix in zip(dy[1:], matrices, strict=True):
                dx = added_product(dx, one, matrix.T)
            add_product(dx, d_low, a.T)
        du = None
        inputs = x
        if up is not None:
            acted = ctx.activation.apply(x)
            inputs = acted * up if any(needs[_NUM_GIVEN : _NUM_GIVEN + len(dy)]) else x
            dx, du = (None, None) if dx is None else gated_backward(dx, x, up, acted, ctx.activation)
        grads = _gradients(ctx, dy, inputs, low, d_low, a, b)
        return dx, du, None, None, None, None, None, *grads


def _gradients(
    ctx: Any, dy: Sequence[Tensor], x: Tensor, low: Tensor, d_low: Tensor, a: Tensor, b: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of a_1, ..., b_1, ... They share their memory, so one kernel turns them all into the format of the weights."""
    needs = ctx.needs_input_grad[_NUM_GIVEN:]
    needs_a, needs_b = any(needs[: len(dy)]), any(needs[len(dy) :])
    shapes = [a.shape] * needs_a + [one.shape for one in b] * needs_b
    memory = x.new_empty(sum(shape.numel() for shape in shapes))
    parts = _views(memory, shapes)
    if needs_a:
        product_into(parts[0], d_low.T, x.T)
    ranks = [one.shape[1] for one in b]
    own_parts = parts[needs_a:]
    for one, own_low, scaling, d in zip(dy, _columns(low, ranks), ctx.scalings, own_parts, strict=False):
        if d.device.type == "cpu":  # in float32 this takes a fourth of the time
            torch.mul(product(own_low.T, one.T).T, scaling, out=d)
        else:
            torch.addmm(d, one.T, own_low, beta=0, alpha=scaling, out=d)
    parts = _views(memory.to(ctx.format), shapes)
    grads: list[Tensor | None] = [*(parts[0].split(ranks) if needs_a else [None] * len(dy))]
    return grads + (list(parts[needs_a:]) if needs_b else [None] * len(dy))


def _columns(matrix: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """l_i (N, r_i)"""
    return (matrix,) if len(ranks) == 1 else matrix.split(list(ranks), dim=1)


def _views(memory: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = memory.split([shape.numel() for shape in shapes]) if shapes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def keep_weight(ctx: Any, weight: Weight) -> Tensor | None:
    """What of `weight` is for `save_for_backward`."""
    is_tensor = isinstance(weight, Tensor)
    ctx.dequantize = None if is_tensor else weight
    return weight if is_tensor else None  # type: ignore[return-value]


def weight_of(ctx: Any, kept: Tensor | None) -> Tensor:
    """W (O, I)"""
    weight: Tensor = ctx.dequantize() if kept is None else kept
    return weight
