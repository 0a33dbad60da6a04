"""The weights of all adapters in the number format that is computed in, made at once when a forward pass begins.

Trained adapters are float32, and a layer would turn its two weights into 16 bits and scale them each time that it
computes. For the 224 adapters of a model these are 1,300 kernels in a forward and a backward pass with gradient
checkpointing, and here about five. The copies hold during the forward pass, and in the backward pass where a block is
computed again. At other times the weights may have changed, so whoever asks then gets new ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from luthier.model.dtype import computed_in
from luthier.model.kernels.lora_linear import Factors
from luthier.model.kernels.varlen import HALVES


@dataclass(frozen=True, slots=True)
class Learned:
    """The weights of some adapters that have the same input."""

    a: tuple[Tensor, ...]
    """(r_i, I)"""
    b: tuple[Tensor, ...]
    """(O_i, r_i)"""
    scalings: tuple[float, ...]

    def is_like(self, one: Tensor) -> bool:
        """Whether all are plain weights in the format and on the device of `one`, and neither shared by processes nor
        gathered for a moment."""
        return all(
            type(weight) is nn.Parameter and weight.ndim == 2 and weight.numel() > 0
            and weight.dtype == one.dtype and weight.device == one.device
            for weight in self.tensors
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.a, *self.b)


def learned_by(layers: Sequence[Any]) -> Learned:
    """Of peft's LoRA layers, each with one active adapter."""
    pairs = list(zip(layers, _names(layers), strict=True))
    return Learned(
        tuple(layer.lora_A[name].weight for layer, name in pairs),
        tuple(layer.lora_B[name].weight for layer, name in pairs),
        tuple(layer.scaling[name] for layer, name in pairs),
    )


def _names(layers: Sequence[Any]) -> list[str]:
    return [layer.active_adapters[0] for layer in layers]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Of a group whose layers all compute as the kernels do."""

    names: list[str]
    """Of the adapter of each layer."""
    learned: Learned
    factors: Factors

    @property
    def dtype(self) -> torch.dtype:
        return self.factors.a.dtype


@dataclass(slots=True)
class Copies:
    """Of the adapters of a model."""

    groups: list[list[Any]]
    """peft's LoRA layers; those of a group have the same input."""
    is_active: Callable[[Any], bool]
    """Whether a layer computes as the kernels do. Asked once in a forward pass."""
    kept: dict[int, Prepared] = field(default_factory=dict)
    """By the id of the first layer of a group."""
    num_running: int = 0
    """Forward passes that have begun and not ended."""

    def attach(self, model: nn.Module) -> None:
        """Make them whenever a forward pass of `model` begins."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def of(self, layers: Sequence[Any]) -> Prepared | None:
        """Of layers that are a group, while a forward or a backward pass runs."""
        if not self.num_running and torch._C._current_graph_task_id() == -1:  # which is that of a backward pass
            self.kept = {}
        found = self.kept.get(id(layers[0]))
        if found is None or len(found.names) != len(layers):
            return None
        are_active = all(
            layer.active_adapters == [name] and not layer.disable_adapters and not layer.merged
            for layer, name in zip(layers, found.names, strict=True)
        )
        return found if are_active else None

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.num_running += 1
        if self.num_running == 1:
            self.kept = {}
            self._make()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.num_running -= 1

    @torch.no_grad()
    def _make(self) -> None:
        groups = [layers for layers in self.groups if all(map(self.is_active, layers))]
        pairs = [(layers, learned_by(layers)) for layers in groups]
        pairs = [(layers, learned) for layers, learned in pairs if learned.is_like(pairs[0][1].a[0])]
        if not pairs or computed_in(pairs[0][1].a[0]) not in HALVES:  # wider copies would be as large as the weights
            return
        found = [learned for _, learned in pairs]
        places = [(scaling, i, j) for i, learned in enumerate(found) for j, scaling in enumerate(learned.scalings)]
        places.sort()  # neighbors with the same scaling are scaled at once
        scaled = [found[i].b[j] for _, i, j in places]
        flat = _flatten_dense_tensors([one for learned in found for one in learned.a] + scaled)
        start = sum(one.numel() for learned in found for one in learned.a)
        for scaling, members in groupby(zip(places, scaled, strict=True), lambda member: member[0][0]):
            end = start + sum(one.numel() for _, one in members)
            if scaling != 1:
                flat[start:end].mul_(scaling)
            start = end
        stacks = [torch.empty(sum(map(len, one.a)), one.a[0].shape[1], device="meta") for one in found]
        views = _unflatten_dense_tensors(flat.to(computed_in(flat)), [*stacks, *scaled])
        b = {(i, j): view for (_, i, j), view in zip(places, views[len(found) :], strict=True)}
        for i, ((layers, learned), a) in enumerate(zip(pairs, views, strict=False)):
            own = tuple(b[i, j] for j in range(len(layers)))
            self.kept[id(layers[0])] = Prepared(_names(layers), learned, Factors(a, own, learned.scalings))


def has_one_adapter(layer: Any) -> bool:
    names = layer.active_adapters
    return len(names) == 1 and names[0] in layer.lora_A
