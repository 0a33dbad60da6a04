"""What loading passes on to training: models and facts about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.model.attention import Attention
    from luthier.model.frozen_models import FrozenModel
    from luthier.model.heads.output_head import OutputHead


@dataclass(frozen=True, slots=True)
class Models:
    """The models that the loss of a stage runs."""

    policy: "nn.Module"
    """The model in training; wrapped for distributed training where that applies."""
    head: "OutputHead"
    """How the policy turns hidden states into logits."""
    frozen: "Mapping[str, FrozenModel]" = field(default_factory=dict)
    """The models that the loss compares the policy with, by name."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with `requires_grad` set, and how it was loaded."""

    model: "nn.Module"
    """The transformers model, or the peft model around it."""
    dtype: "torch.dtype"
    """Number format of the weights; trainable ones may be float32."""
    attention: "Attention"
    num_trainable: int
    num_parameters: int
    padding_reason: str | None
    """None if rows can be concatenated without padding, else the reason why not."""
