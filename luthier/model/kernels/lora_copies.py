"""The weights of all adapters in the number format that is computed in, made at once when a forward pass begins.

Trained adapters are float32, and a layer would turn its two weights into 16 bits and scale them each time that it
computes. For the 224 adapters of a model these are 1,300 kernels in a forward and a backward pass with gradient
checkpointing, and here about five. The copies hold during the forward pass, and in the backward pass where a block is
computed again. At other times the weights may have changed, so whoever asks then gets new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from luthier.model.dtype import computed_in
from luthier.model.kernels.lora_linear import Factors, factors_of

HALVES = (torch.bfloat16, torch.float16)
"""In a wider format copies would take as much memory as the weights."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The weights of some adapters that have the same input."""

    a: tuple[Tensor, ...]
    """(r_i, I)"""
    b: tuple[Tensor, ...]
    """(O_i, r_i)"""
    scalings: tuple[float, ...]

    def is_same(self, other: "Learned") -> bool:
        """Whether these are the very weights of `other`."""
        pairs = zip(self.tensors, other.tensors, strict=False)
        return self.scalings == other.scalings and all(one is another for one, another in pairs)

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
    names = [layer.active_adapters[0] for layer in layers]
    pairs = list(zip(layers, names, strict=True))
    return Learned(
        tuple(layer.lora_A[name].weight for layer, name in pairs),
        tuple(layer.lora_B[name].weight for layer, name in pairs),
        tuple(layer.scaling[name] for layer, name in pairs),
    )


@dataclass(slots=True)
class Copies:
    """Of the adapters of a model."""

    groups: list[list[Any]]
    """peft's LoRA layers; those of a group have the same input."""
    kept: dict[int, tuple[Learned, list[Any], Factors]] = field(default_factory=dict)
    """By the id of the first weight: of what, in which state, the copies."""
    num_running: int = 0
    """Forward passes that have begun and not ended."""

    def attach(self, model: nn.Module) -> None:
        """Make them whenever a forward pass of `model` begins."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def factors(self, learned: Learned, dtype: torch.dtype) -> Factors:
        if not self.num_running and torch._C._current_graph_task_id() == -1:  # nor does a backward pass run
            self.kept = {}
        kept = self.kept.get(id(learned.tensors[0]))
        if kept is not None:
            made_of, state, factors = kept
            if made_of.is_same(learned) and factors.a.dtype == dtype and state == _state(learned):
                return factors
        return factors_of(learned.a, learned.b, learned.scalings, dtype)

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
        found = [learned_by(layers) for layers in self.groups if all(map(has_one_adapter, layers))]
        found = [learned for learned in found if learned.is_like(found[0].a[0])]
        if not found or computed_in(found[0].a[0]) not in HALVES:
            return
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
        for i, (learned, a) in enumerate(zip(found, views, strict=False)):
            own = tuple(b[i, j] for j in range(len(learned.b)))
            self.kept[id(learned.a[0])] = (learned, _state(learned), Factors(a, own, learned.scalings))


def has_one_adapter(layer: Any) -> bool:
    names = layer.active_adapters
    return len(names) == 1 and names[0] in layer.lora_A


def _state(learned: Learned) -> list[Any]:
    """What changes with the numbers of the weights, as far as PyTorch knows."""
    return [(one.data_ptr(), one._version) for one in learned.tensors]
