"""What travels from loading to training: weights, and what is known of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from luthier.model.heads import OutputHead


@dataclass(frozen=True, slots=True)
class Models:
    """The networks that the loss of a stage may ask."""

    policy: "nn.Module"
    """The model that learns; wrapped for distributed training where that applies."""
    head: "OutputHead"
    """How the policy turns hidden states into logits."""
