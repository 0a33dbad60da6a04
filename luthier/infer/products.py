"""The linear layers of a model on a CPU, computed by oneDNN instead of MKL while the model answers.

A decoding step reads every weight once, for a few rows. MKL reads them more slowly than memory allows, above all for 2
to 16 rows. oneDNN is faster, most of all with weights that are packed in its own order. All layers and the head of
SmolLM2-135M on one core of an EPYC 9004, in ms for 1, 8 and 64 rows:

    float32     MKL 46, 77, 242     oneDNN 42, 68, 201     packed 38, 42, 178
    bfloat16    oneDNN, which PyTorch calls itself, 33, 42, 111     packed 20, 22, 88

Packed weights are copies, so they are made where memory allows it, and last as long as the weights do not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.model.dtype import computed_in
from luthier.model.kernels.plain_linear import has_own_products
from luthier.model.kernels.products import has_kernel, one_dnn, packed

SHARE_FOR_COPIES = 0.5
"""Of the free memory, at most, that packed weights take."""
NUM_ROWS = 64
"""That weights are packed for. For fewer and for more rows, packing them for just these is no faster."""


class Products:
    """How the plain linear layers of a model are computed while it answers."""

    def __init__(self, model: nn.Module, free_bytes: int | None = None) -> None:
        """`free_bytes`: the memory that is free; None if no weights are to be packed."""
        self._layers: list[Any] = [module for module in model.modules() if _is_plain(module)]
        num_bytes = sum(layer.weight.nbytes for layer in self._layers)
        self._packs = free_bytes is not None and num_bytes <= SHARE_FOR_COPIES * free_bytes
        if not self._packs:  # in bfloat16 PyTorch calls oneDNN itself
            self._layers = [layer for layer in self._layers if layer.weight.dtype is torch.float32]
        self._known: list[tuple[int, int]] = []
        self._products: list[partial[Tensor]] = []

    def prepare(self) -> None:
        """Pack the weights, if it has not been done or they are others by now."""
        found = [(layer.weight.data_ptr(), layer.weight._version) for layer in self._layers]
        if found != self._known:
            self._products = [self._product(layer) for layer in self._layers]
            self._known = found

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the layers compute so. Without gradients."""
        self.prepare()
        pairs = zip(self._layers, self._products, strict=True)
        changed = [(layer, product, vars(layer).get("forward")) for layer, product in pairs if _is_as_before(layer)]
        for layer, product, _ in changed:
            layer.forward = product
        try:
            yield
        finally:
            for layer, _, forward in changed:
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _product(self, layer: nn.Linear) -> "partial[Tensor]":
        weight = layer.weight.detach()
        return partial(_multiplied, weight, _packed(weight) if self._packs else weight, layer.bias)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer of PyTorch that no library has changed, with a weight that oneDNN takes."""
    if type(module) is not nn.Linear or not _is_as_before(module):
        return False
    weight = module.weight
    is_usual = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.layout is torch.strided
    return is_usual and has_kernel(weight.dtype)


def _is_as_before(layer: nn.Module) -> bool:
    return "forward" not in vars(layer) or has_own_products(layer)


def _packed(weight: Tensor) -> Tensor:
    return packed(weight, NUM_ROWS)


def _multiplied(weight: Tensor, packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weight, packed (O, I), bias (O,), x (..., I) -> (..., O)"""
    if not computed_in(x) == x.dtype == weight.dtype:
        return functional.linear(x, weight, bias)
    return one_dnn(x, packed, bias)
