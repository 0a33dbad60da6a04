"""aqlm 1.1 on CPUs: codebooks of 256 vectors are multiplied by a kernel that is wrong, forwards and backwards.

Forward, its threads add to one vector without synchronization, so sums are lost at random. Backward, the codes are
transposed for that kernel, and the shapes do not match. Codebooks of other sizes are dequantized and multiplied, which
is correct; here that is done for all.
https://github.com/Vahe1994/AQLM/blob/main/inference_lib/src/aqlm/inference_kernels/numba_kernel.py

w = s (c_1[code_1] + c_2[code_2] + ...), a vector of `in_group_size` weights of one output at a time.
Shapes: codes (out groups, in groups, codebooks), codebooks (codebooks, 2^bits, out group, in group), s (out groups).
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def use_dequantized_matmul(model: "nn.Module") -> None:
    """Every layer of the library that lies on the CPU computes x W^T and the gradient of x from W as unpacked."""
    for module in model.modules():
        layer: Any = module
        if type(layer).__module__ == "aqlm.inference" and layer.codes.device.type == "cpu":
            layer.gemv_op = layer.gemm_op = _multiplication()
            layer.use_gemv_rule = lambda _: True  # there is one way only


@lru_cache(maxsize=1)
def _multiplication() -> Any:
    import torch
    from aqlm.inference_kernels.dequantization import dequantize_gemm

    class Multiplication(torch.autograd.Function):
        """W is unpacked for each pass, and not kept between them."""

        @staticmethod
        def forward(ctx: Any, x: Any, codes: Any, codebooks: Any, scales: Any, bias: Any) -> Any:
            ctx.save_for_backward(codes, codebooks, scales)
            return dequantize_gemm(x, codes, codebooks, scales, bias)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            codes, codebooks, scales = ctx.saved_tensors
            turned = (codes.transpose(0, 1), codebooks.transpose(2, 3), scales.transpose(0, 1).transpose(2, 3))
            return dequantize_gemm(grad, *turned, None), None, None, None, None

    return Multiplication
