"""Products of matrices on a CPU, computed in another way than PyTorch's where that is faster.

**float32 on an AMD processor.** PyTorch leaves it to MKL, which uses AVX-512 on processors of Intel only. oneDNN is
faster where AMD has it, and everywhere for the narrow matrices of LoRA. Two cores, the layers of SmolLM2-135M for 690
to 2,000 tokens:

                                                  with AVX-512 (EPYC 9004)     with AVX2 alone
    x W^T, dy W                     GFLOP/s       MKL 160-200, oneDNN 205-220  MKL 125-180, oneDNN 110-165
    x A^T, dy B of rank 8, 1,536 wide    ms       MKL 0.6-0.8, oneDNN 0.3      MKL 0.5-1.9, oneDNN 0.3-0.4
    dy^T x                                        MKL is as fast               MKL is as fast

oneDNN takes about a millisecond to prepare for each new shape, so small products stay with MKL.

**16 bits.** PyTorch calls oneDNN itself. Where the processor has no instructions for the format, that is slow: with
AVX2 alone x W^T of 700 tokens runs at 15 GFLOP/s in bfloat16, dy W at 2, and y + low B^T takes 5 to 20 ms instead of
0.3. There the matrices are turned into float32, which takes a twentieth of the product, and the result is rounded.

**One or two rows** take as long as reading the matrix. `x W^T` reads 11 GB/s then, and oneDNN 20. MKL reads 30 on two
cores, as fast as memory allows, if it is asked in one of the ways of `FewRows`.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from luthier.core.machine import cpu_has_bf16, has_amd_cpu
from luthier.model.kernels.varlen import HALVES, stands_for_a_gpu

MANY = 2**26
"""Multiplications of a product from which on oneDNN is faster, if a model has some twenty layers of that shape."""
NARROW = 64
"""A product with a side this small takes as long as reading the matrix of the two other sides."""
MANY_READ = 2**18
"""Numbers of that matrix from which on oneDNN is faster."""
FEW_ROWS = 16
"""Up to here a product in 16 bits takes no longer than reading the matrix to turn it into float32."""
FAULTS = (AttributeError, RuntimeError)
"""What PyTorch raises where it was built without oneDNN, or the processor has no instructions for a format."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I), weight (O, I), bias (O) -> x weight^T + bias (N, O). Matrices may be transposed in memory.

    The result has the format of x. `weight` has it too, or is in float32 with the numbers of a 16-bit format.
    """
    return one_dnn(x, weight, bias) if is_faster(x, weight) else usual_product(x, weight, bias)


def usual_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, never by oneDNN in float32."""
    if takes_float32(x, weight):
        with torch.autocast("cpu", enabled=False):
            return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Writes `product` into `out`, which is small."""
    if is_faster(x, weight) or takes_float32(x, weight):
        out.copy_(product(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def added_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y (N, O) + `product`, which may be in the memory of `y`."""
    if not is_faster(x, weight):
        return add_product(y, x, weight)
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return total


def add_product(y: Tensor, x: Tensor, weight: Tensor, scaling: float = 1.0) -> Tensor:
    """Adds scaling * x weight^T to y, in its memory. For narrow matrices, of which `added_product` is slower."""
    if not takes_float32(x, weight):
        return y.addmm_(x, weight.T, alpha=scaling)
    with torch.autocast("cpu", enabled=False):
        return y.copy_(torch.addmm(y.float(), x.float(), weight.float().T, alpha=scaling))


def takes_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these matrices is computed in float32, though x has 16 bits."""
    return x.dtype in HALVES and (weight.dtype is torch.float32 or is_slow(x, weight, x.dtype))


def is_slow(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch takes longer for this product in `dtype` than it would in float32, casts included."""
    if dtype not in HALVES or not x.is_cpu or has_half_kernel(dtype):
        return False
    return _are_plain(x, weight) and (len(x) >= FEW_ROWS or not weight.is_contiguous())


def format_here(x: Tensor) -> torch.dtype:
    """The format of a matrix that many x are multiplied by one after the other."""
    is_on_cpu = x.is_cpu or (x.is_meta and not stands_for_a_gpu(x))
    return torch.float32 if is_on_cpu and x.dtype in HALVES and not has_half_kernel(x.dtype) else x.dtype


@cache
def has_half_kernel(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for this 16-bit format, and PyTorch a library that uses them."""
    if dtype is torch.bfloat16:
        return cpu_has_bf16() and has_kernel(dtype)
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster one for the product of these matrices, and can compute it."""
    if x.dtype is not torch.float32 or not x.is_cpu:  # first, since an accelerator waits for this code
        return False
    (num_rows, inner), outer = x.shape, weight.shape[0]
    num_products, narrowest = num_rows * inner * outer, min(num_rows, inner, outer)
    is_narrow = 0 < narrowest <= NARROW and num_products >= MANY_READ * narrowest
    is_fit = is_narrow or (num_products >= MANY and is_better_for_wide())
    return is_fit and _are_usual(x, weight) and not torch.is_autocast_enabled("cpu") and is_better_here()


def _are_usual(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight` is on the CPU in float32 too, in one piece, and both are plain tensors.

    Of a weight that is a part of a larger matrix, oneDNN takes a thousand times as long. `x` may be one.
    """
    is_alike = weight.dtype is torch.float32 and weight.is_cpu and is_in_one_piece(weight)
    return is_alike and _are_plain(x, weight)


def _are_plain(*matrices: Tensor) -> bool:
    """Whether no library has made tensors of its own of them, as those that processes share."""
    return all(type(matrix) in (Tensor, nn.Parameter) for matrix in matrices)


def is_in_one_piece(weight: Tensor) -> bool:
    """Whether the numbers of a matrix follow each other in memory, by rows or by columns."""
    return weight.is_contiguous() or weight.T.is_contiguous()


@cache
def is_better_here() -> bool:
    """Whether this is an AMD processor, and PyTorch has both libraries."""
    return has_amd_cpu() and torch.backends.mkl.is_available() and has_kernel(torch.float32)


@cache
def is_better_for_wide() -> bool:
    """Whether the processor has AVX-512, which MKL uses on those of Intel only."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


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
