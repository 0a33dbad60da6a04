"""Products of float32 matrices on an AMD processor, computed by oneDNN instead of MKL.

PyTorch leaves them to MKL, which is slower there. On two cores of an EPYC 9004, the layers of SmolLM2-135M for 690 to
2,000 tokens:

    x W^T, dy W              MKL 160 to 200, oneDNN 205 to 220 GFLOP/s
    x A^T, dy B, dy^T low    of rank 8 and width 1,536: MKL 0.6 to 0.8, oneDNN 0.3 ms
    dy^T x                   MKL is as fast

oneDNN takes about a millisecond to prepare for each new shape, so small products stay with MKL. In 16 bits PyTorch
calls oneDNN itself.

For one or two rows a product takes as long as reading the matrix. `x W^T` reads 11 GB/s then, and oneDNN 20. MKL reads
30 on two cores, as fast as memory allows, if it is asked in one of the ways of `FewRows`.
"""

from functools import cache

import torch
from torch import Tensor, nn

from luthier.core.machine import has_amd_cpu

MANY = 2**26
"""Multiplications of a product from which on oneDNN is faster, if a model has some twenty layers of that shape."""
NARROW = 64
"""A product with a side this small takes as long as reading the matrix of the two other sides."""
MANY_READ = 2**18
"""Numbers of that matrix from which on oneDNN is faster."""
FAULTS = (AttributeError, RuntimeError)
"""What PyTorch raises where it was built without oneDNN, or the processor has no instructions for a format."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, I), weight (O, I) -> x weight^T (N, O). Both may be transposed in memory."""
    return one_dnn(x, weight) if is_faster(x, weight) else x @ weight.T


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Writes `product` into `out`, which is small."""
    if is_faster(x, weight):
        out.copy_(one_dnn(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def added_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y (N, O) + `product`, which may be in the memory of `y`."""
    if not is_faster(x, weight):
        return y.addmm_(x, weight.T)
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return total


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster one for the product of these matrices, and can compute it."""
    if x.dtype is not torch.float32 or not x.is_cpu:  # first, since an accelerator waits for this code
        return False
    (num_rows, inner), outer = x.shape, weight.shape[0]
    num_products, narrowest = num_rows * inner * outer, min(num_rows, inner, outer)
    is_large = num_products >= MANY or (0 < narrowest <= NARROW and num_products >= MANY_READ * narrowest)
    return is_large and _are_usual(x, weight) and not torch.is_autocast_enabled("cpu") and is_better_here()


def _are_usual(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight` is on the CPU in float32 too, in one piece, and both are plain tensors.

    Of a weight that is a part of a larger matrix, oneDNN takes a thousand times as long. `x` may be one.
    """
    is_alike = weight.dtype is torch.float32 and weight.is_cpu and is_in_one_piece(weight)
    return is_alike and all(type(matrix) in (Tensor, nn.Parameter) for matrix in (x, weight))


def is_in_one_piece(weight: Tensor) -> bool:
    """Whether the numbers of a matrix follow each other in memory, by rows or by columns."""
    return weight.is_contiguous() or weight.T.is_contiguous()


@cache
def is_better_here() -> bool:
    """Whether this is an AMD processor, and PyTorch has both libraries."""
    return has_amd_cpu() and torch.backends.mkl.is_available() and has_kernel(torch.float32)


@cache
def has_kernel(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this format on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(2, 16, dtype=dtype, device="cpu"), torch.eye(16, dtype=dtype, device="cpu")
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        return torch.equal(one_dnn(x, weight), x) and torch.equal(one_dnn(x, packed(weight, len(x))), x)
    except FAULTS:
        return False


def one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I) or what `packed` made of it, bias (O,) -> (..., O). Without gradients."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def for_few_rows(weight: Tensor, bias: Tensor | None) -> "FewRows | None":
    """The product of weight (O, I) and bias (O,) with one or two rows; None if the usual one is as fast."""
    is_fit = weight.dtype is torch.float32 and weight.is_cpu and weight.is_contiguous() and is_better_here()
    return FewRows(weight, bias) if is_fit else None


class FewRows:
    """x W^T + b for one or two rows x, at the speed at which memory is read. Without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight (O, I) in one piece, in float32; bias (O,)"""
        outer = len(weight)
        num_parts = max(torch.get_num_threads(), 2)
        rest = outer % num_parts
        self.weight, self.bias = weight, bias
        self.parts = weight[: outer - rest].view(num_parts, -1, weight.shape[1])
        self.rest = weight[outer - rest :] if rest else None

    @staticmethod
    def are_few(x: Tensor) -> bool:
        return x.numel() <= 2 * x.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)"""
        rows = x.reshape(-1, x.shape[-1])
        y = self._of_row(rows) if len(rows) == 1 else (self.weight @ rows.T).T.contiguous()
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def _of_row(self, x: Tensor) -> Tensor:
        """(1, I) -> (1, O). One core would read the whole matrix, so parts of it are the matrices of a batch."""
        num_parts, _, inner = self.parts.shape
        # The column of a transposed row: for one of the usual strides MKL takes four times as long.
        column = x.contiguous().as_strided((num_parts, inner, 1), (0, 1, inner))
        y = torch.bmm(self.parts, column).view(1, -1)
        return y if self.rest is None else torch.cat([y, x @ self.rest.T], -1)


def packed(weight: Tensor, num_rows: int) -> Tensor:
    """A copy of weight (O, I) in the order in which oneDNN reads it, for inputs of `num_rows` rows."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows)
    return copy
