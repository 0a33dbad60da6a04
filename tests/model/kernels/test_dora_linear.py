"""Value and gradients of a linear layer with DoRA are those of the equations."""

import torch

from luthier.model.kernels.dora_linear import DoraLinear, row_norms


def test_gradients_are_those_of_the_equations():
    torch.manual_seed(0)
    sizes = ((7, 5), (6, 5), (6,), (2, 5), (6, 2), (6,))
    x, w, bias, a, b, c = (torch.randn(size, dtype=torch.float64) for size in sizes)
    for one in (x, a, b, c):
        one.requires_grad_()
    for weight in (w, lambda: w):
        y = DoraLinear.apply(x, weight, bias, a, b, c, 0.7)
        torch.testing.assert_close(y, c * (x @ (w + 0.7 * b @ a).T) + bias)
        for own_bias in (bias, None):
            assert torch.autograd.gradcheck(
                lambda x, a, b, c, w=weight, bias=own_bias: DoraLinear.apply(x, w, bias, a, b, c, 0.7), (x, a, b, c)
            )


def test_norms_are_of_the_rows_of_the_adapted_weight():
    torch.manual_seed(0)
    w, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    torch.testing.assert_close(row_norms(w, a, b, 0.7), torch.linalg.norm(w + 0.7 * b @ a, dim=1))
    half = w.bfloat16()
    norms = row_norms(half, a, b, 0.7)  # of a weight in 16 bits too in float32
    torch.testing.assert_close(norms, torch.linalg.norm(half.float() + 0.7 * b @ a, dim=1))
