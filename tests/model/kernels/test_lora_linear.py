"""Value and gradients of a linear layer with LoRA are those of the equations."""

import torch

from luthier.model.kernels.lora_linear import LoraLinear
from luthier.model.kernels.swiglu import SILU


def test_gradients_are_those_of_the_equations():
    torch.manual_seed(0)
    x, up, w, bias, a, b = (
        torch.randn(size, dtype=torch.float64) for size in ((7, 5), (7, 5), (6, 5), (6,), (2, 5), (6, 2))
    )
    for one in (x, up, a, b):
        one.requires_grad_()
    for weight in (w, lambda: w):
        y = LoraLinear.apply(x, None, None, weight, bias, a, b, 0.7)
        torch.testing.assert_close(y, x @ (w + 0.7 * b @ a).T + bias)
        y = LoraLinear.apply(x, up, SILU, weight, bias, a, b, 0.7)
        torch.testing.assert_close(y, (SILU.apply(x) * up) @ (w + 0.7 * b @ a).T + bias)
        for own_bias in (bias, None):
            assert torch.autograd.gradcheck(
                lambda x, a, b, w=weight, bias=own_bias: LoraLinear.apply(x, None, None, w, bias, a, b, 0.7), (x, a, b)
            )
            assert torch.autograd.gradcheck(
                lambda *t, w=weight, bias=own_bias: LoraLinear.apply(*t[:2], SILU, w, bias, *t[2:], 0.7), (x, up, a, b)
            )
