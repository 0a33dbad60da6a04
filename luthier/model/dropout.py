"""Dropout switched off for a whole training run; the model stays in training mode for gradient checkpointing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def switch_dropout_off(model: "nn.Module") -> None:
    """Every rate is 0: those of dropout layers, and those that attention and blocks hand to functions."""
    for module in model.modules():
        is_layer = "Dropout" in type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or (is_layer and name == "p")):
                setattr(module, name, 0.0)
