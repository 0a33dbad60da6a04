"""What Muon of PyTorch does on a CPU, and what this package has it do.

If the test of the plain library fails, the library has been changed, and `luthier.model.compat.muon_cpu` with it.
"""

import pytest
import torch
from torch.optim import _muon

from luthier.model.compat import muon_cpu
from luthier.model.compat.muon_cpu import orthogonalizing_fast
from luthier.model.kernels import products

COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7


def test_the_plain_library_orthogonalizes_in_bfloat16():
    found = getattr(_muon, muon_cpu.NAME)(torch.randn(4, 6), COEFFICIENTS, STEPS, EPS)
    assert found.dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 5)])
def test_in_float32_the_singular_values_are_those_of_the_polynomial(monkeypatch, shape):
    """s <- a s + b s^3 + c s^5 of each, and the singular vectors stay."""
    monkeypatch.setattr(products, "has_half_kernel", lambda dtype: False)
    torch.manual_seed(0)
    grad = torch.randn(shape)
    with orthogonalizing_fast():
        found = getattr(_muon, muon_cpu.NAME)(grad, COEFFICIENTS, STEPS, EPS)
    left, values, right = torch.linalg.svd(grad.double() / grad.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(found.double(), left @ values.diag() @ right, rtol=1e-3, atol=1e-4)


def test_where_the_format_is_fast_it_is_the_library_itself(monkeypatch):
    monkeypatch.setattr(products, "has_half_kernel", lambda dtype: True)
    usual, grad = getattr(_muon, muon_cpu.NAME), torch.randn(6, 4)
    with orthogonalizing_fast():
        found = getattr(_muon, muon_cpu.NAME)(grad, COEFFICIENTS, STEPS, EPS)
    assert torch.equal(found, usual(grad, COEFFICIENTS, STEPS, EPS))
    assert getattr(_muon, muon_cpu.NAME) is usual
