"""Dropout of a model: whether any is active, and switching it off for a whole training run, in which the model stays in
training mode for gradient checkpointing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def switch_dropout_off(model: "nn.Module") -> None:
    """Every rate is 0: those of dropout layers, and those that attention and blocks hand to functions."""
    for module, name, _ in _rates(model):
        setattr(module, name, 0.0)


def has_dropout(model: "nn.Module") -> bool:
    """Whether any rate is above 0."""
    return any(rate > 0 for _, _, rate in _rates(model))


def _rates(model: "nn.Module") -> Iterator[tuple[Any, str, float]]:
    """(module, attribute, rate)."""
    for module in model.modules():
        is_layer = "Dropout" in type(module).__name__
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or (is_layer and name == "p")):
                yield module, name, value
