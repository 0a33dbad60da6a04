"""The product of gate and up projection in an MLP as one operation, forward and backward.

    h  = act(g) * u
    dg = dh * u * act'(g)        du = dh * act(g)

With act = silu this is SwiGLU, with gelu GEGLU (https://arxiv.org/abs/2002.05202, eq. 5). Of the four tensors of this
size, autograd keeps g, u and act(g), and h for the layer behind. Here g and u are kept, and the others computed again.

g, u, h: (..., F), F the intermediate size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.activations import GELUTanh, SiLUActivation

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Activation:
    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the output, input) -> gradient of the input."""


SILU = Activation(silu, aten.silu_backward)
GELU = Activation(gelu, aten.gelu_backward)
GELU_TANH = Activation(partial(gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh"))


class GatedProduct(torch.autograd.Function):
    """Apply it to (g, u, activation)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *gated_backward(dh, gate, up, ctx.activation.apply(gate), ctx.activation), None


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """h"""
    return activation.apply(gate).mul_(up)


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, acted: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """dg and du. `acted` is act(g), which becomes du."""
    return activation.backward(dh * up, gate), acted.mul_(dh)


def activation_of(module: nn.Module) -> Activation | None:
    """The function of this module; None if it is not one of the above."""
    kind = type(module)
    if kind in (nn.SiLU, SiLUActivation):
        return SILU
    if kind is nn.GELU:
        return {"none": GELU, "tanh": GELU_TANH}[module.approximate]  # type: ignore[index]
    return GELU_TANH if kind is GELUTanh else None
