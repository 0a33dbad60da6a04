"""The linear layers of a model on a CPU, computed by oneDNN instead of MKL while the model answers.

A decoding step reads every weight once, for a few rows. MKL reads them more slowly than memory allows, above all for 2
to 16 rows. oneDNN is faster, most of all with weights that are packed in its own order. All layers and the head of
SmolLM2-135M on one core of an EPYC 9004, in ms for 1, 8 and 64 rows:

    float32     MKL 46, 77, 242     oneDNN 42, 68, 201     packed 38, 42, 178
    bfloat16    oneDNN, which PyTorch calls itself, 33, 42, 111     packed 20, 22, 88

One or two rows in float32 are left to MKL, asked in the ways of `FewRows`: 27 and 30 ms on one core, 18 and 16 on two,
where packed weights take 25 and 27.
Packed weights are copies, so they are made where memory allows it, and last as long as the weights do not change. Those
of layers that are given the same input are one matrix, which is a tenth faster still.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.model.dtype import computed_in
from luthier.model.kernels.fuse import groups_of_one_input
from luthier.model.kernels.lora_layers import has_hooks
from luthier.model.kernels.plain_linear import has_own_products
from luthier.model.kernels.products import FewRows, for_few_rows, has_kernel, is_in_one_piece, one_dnn, packed

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
        self._groups = _groups(model, self._layers) if self._packs else []
        self._known: list[tuple[int, int]] = []
        self._products: dict[Any, Callable[[Tensor], Tensor]] = {}

    def prepare(self) -> None:
        """Pack the weights, if it has not been done or they are others by now."""
        found = [(layer.weight.data_ptr(), layer.weight._version) for layer in self._layers]
        if found != self._known:
            self._products = dict(self._made())
            self._known = found

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the layers compute so. Without gradients."""
        self.prepare()
        pairs = self._products.items()
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

    def _made(self) -> Iterator[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
        grouped = set()
        for layers in self._groups:
            shared = _SharedProduct(layers)
            yield from ((layer, partial(shared.part, place)) for place, layer in enumerate(layers))
            grouped.update(layers)
        for layer in self._layers:
            if layer not in grouped:
                yield layer, _Product(layer, packs=self._packs)


class _Product:
    """x W^T + b of one layer."""

    def __init__(self, layer: nn.Linear, *, packs: bool) -> None:
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.dtype = self.weight.dtype
        self.packed = _packed(self.weight) if packs else self.weight
        self.for_few_rows = for_few_rows(self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)"""
        if computed_in(x) == x.dtype == self.dtype:
            return self.in_own_format(x)
        return functional.linear(x, self.weight, self.bias)

    def in_own_format(self, x: Tensor) -> Tensor:
        """The same for x in the format of the weights, without autocast."""
        if self.for_few_rows is not None and FewRows.are_few(x):
            return self.for_few_rows(x)
        return one_dnn(x, self.packed, self.bias)


class _SharedProduct:
    """Layers that are given the same input, one after the other, as one product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
        self.widths, self.dtype = [len(weight) for weight in weights], weights[0].dtype
        self.packed = _packed(torch.cat(weights))
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        few = [for_few_rows(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self.for_few_rows = [product for product in few if product is not None]
        """Of each layer, or of none."""
        self.input: tuple[Tensor, int] | None = None
        """What was computed last, and its version."""
        self.outputs: list[Tensor | None] = []

    def whole(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., sum of O)"""
        if self._can_multiply(x):
            return self.in_own_format(x)
        return torch.cat([functional.linear(x, layer.weight, layer.bias) for layer in self.layers], -1)

    def in_own_format(self, x: Tensor) -> Tensor:
        """The same for x in the format of the weights, without autocast."""
        if self.for_few_rows and FewRows.are_few(x):
            return torch.cat([product(x) for product in self.for_few_rows], -1)
        return one_dnn(x, self.packed, self.bias)

    def part(self, place: int, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O) of the layer at this place."""
        if not self._can_multiply(x):
            layer = self.layers[place]
            return functional.linear(x, layer.weight, layer.bias)
        if self.for_few_rows and FewRows.are_few(x):
            return self.for_few_rows[place](x)
        y = self.outputs[place] if self._is_known(x) else None
        if y is None:
            self.input, self.outputs = (x, x._version), [*one_dnn(x, self.packed, self.bias).split(self.widths, -1)]
            y = self.outputs[place]
            assert y is not None
        self.outputs[place] = None
        if not any(output is not None for output in self.outputs):
            self.input = None
        return y.view(*x.shape[:-1], y.shape[-1])

    def _can_multiply(self, x: Tensor) -> bool:
        return computed_in(x) == x.dtype == self.dtype

    def _is_known(self, x: Tensor) -> bool:
        """Whether x is what was computed last: the same memory, in which nothing has been written since.

        What was computed last is kept, so its memory is not that of a newer tensor.
        """
        if self.input is None:
            return False
        known, version = self.input
        if x._version != version or x.data_ptr() != known.data_ptr() or x.numel() != known.numel():
            return False
        return x is known or (x.is_contiguous() and known.is_contiguous())


def together(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """What layers give for the same x (..., I), one after the other: (..., sum of O).

    Of the layers as they are now, in a context in which they are computed in one or another way, with or without
    autocast.
    """
    product = None if any(map(has_hooks, layers)) else _product_of([vars(layer).get("forward") for layer in layers])
    if product is None:
        return layers[0] if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], -1)
    whole = product.whole if isinstance(product, _SharedProduct) else product
    if torch.is_autocast_enabled("cpu"):
        return whole
    # Looking at x and at autocast in each product would take a tenth of a decoding step.
    dtype = product.dtype
    return lambda x: product.in_own_format(x) if x.dtype is dtype else whole(x)


def _product_of(forwards: Sequence[Any]) -> "_Product | _SharedProduct | None":
    """The one product that these forward passes are all parts of, in their order."""
    if len(forwards) == 1 and isinstance(forwards[0], _Product):
        return forwards[0]
    shared = {forward.func.__self__ for forward in forwards if _is_part(forward)}
    if len(shared) != 1 or not all(map(_is_part, forwards)):
        return None
    (product,) = shared
    in_order = [forward.args[0] for forward in forwards] == list(range(len(product.layers)))
    return product if in_order else None


def _is_part(forward: Any) -> bool:
    return isinstance(forward, partial) and getattr(forward.func, "__func__", None) is _SharedProduct.part


def _groups(model: nn.Module, layers: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Of `layers`, those that are given the same input."""
    found, plain = [], set(layers)
    for parts in groups_of_one_input(model, {}):
        group: list[Any] = [getattr(part, "base_layer", part) for part in parts]
        alike = {_kind(layer) for layer in group if layer in plain}
        if len(alike) == 1 and plain.issuperset(group):
            found.append(group)
    return found


def _kind(layer: nn.Linear) -> tuple[torch.dtype, bool, bool]:
    return layer.weight.dtype, layer.weight.is_contiguous(), layer.bias is None


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer of PyTorch that no library has changed, with a weight that oneDNN takes."""
    if type(module) is not nn.Linear or not _is_as_before(module):
        return False
    weight = module.weight
    is_usual = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.layout is torch.strided
    return is_usual and is_in_one_piece(weight) and has_kernel(weight.dtype)


def _is_as_before(layer: nn.Module) -> bool:
    return "forward" not in vars(layer) or has_own_products(layer)


def _packed(weight: Tensor) -> Tensor:
    return packed(weight, NUM_ROWS)
