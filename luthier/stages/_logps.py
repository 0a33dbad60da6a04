"""What the stages that compare answers share: how likely each sequence of a batch is.

B sequences, K labelled tokens of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.collate import model_inputs
from luthier.model.types import Models

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probabilities of the learned tokens of every sequence."""

    tokens: "Tensor"
    """(K,) log p(x_t | x_<t), in the order of `batch["targets"]`."""
    sums: "Tensor"
    """(B,) their sums by sequence."""
    lengths: "Tensor"
    """(B,) how many there are; 0 for a sequence that only fills a batch up."""
    mean_logits: "Tensor"
    """(B,) the mean over these tokens of the mean logit over the vocabulary, without gradients."""


def sequence_logps(models: Models, batch: Mapping[str, Any]) -> SequenceLogps:
    """How likely the policy finds each sequence of the batch."""
    from luthier.model.heads.output_head import token_logps

    tokens, mean_logits = token_logps(
        models.policy, models.head, model_inputs(batch), batch["positions"], batch["targets"]
    )
    lengths = num_targets(batch)
    mean = summed_by_sequence(mean_logits, batch) / lengths.clamp(min=1)
    return SequenceLogps(tokens, summed_by_sequence(tokens, batch), lengths, mean)


def summed_by_sequence(values: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) -> (B,)."""
    return values.new_zeros(batch["ends"].numel()).index_add(0, batch["target_rows"], values)


def num_targets(batch: Mapping[str, Any]) -> "Tensor":
    """(B,) how many tokens of each sequence are learned."""
    import torch

    return torch.bincount(batch["target_rows"], minlength=batch["ends"].numel())
