"""Muon of PyTorch orthogonalizes in bfloat16 on every device (torch 2.10 to 2.14, `torch/optim/_muon.py`).

A CPU without instructions for that format multiplies so at 2 to 15 GFLOP/s, and at 130 in float32. There it is done in
float32, by the same iteration (https://kellerjordan.github.io/posts/muon):

    X <- G / ||G||        X <- a X + (b A + c A^2) X  with  A = X X^T, for a few steps
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.optim import _muon

from luthier.model.kernels.products import format_here

NAME = "_zeropower_via_newtonschulz"


@contextmanager
def orthogonalizing_fast() -> Iterator[None]:
    """A context in which torch's Muon steps."""
    usual = getattr(_muon, NAME)
    setattr(_muon, NAME, partial(_orthogonalized, usual))
    try:
        yield
    finally:
        setattr(_muon, NAME, usual)


def _orthogonalized(
    usual: Callable[..., Tensor], grad: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """G (m, n) -> about U V^T of its singular value decomposition."""
    if format_here(grad.new_empty(0, dtype=torch.bfloat16)) is torch.bfloat16:
        return usual(grad, coefficients, num_steps, eps)
    a, b, c = coefficients
    is_tall = grad.shape[0] > grad.shape[1]
    x = (grad.T if is_tall else grad).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
