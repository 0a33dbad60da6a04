"""Log-probabilities of the sequences of a batch, for the stages that compare answers.

B sequences, K labeled tokens in total.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.collate import model_inputs
from luthier.model.types import Models
from luthier.stages._segments import counted, summed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probabilities of the labeled tokens of every sequence."""

    tokens: "Tensor"
    """(K,) log p(x_t | x_<t), in the order of `batch["targets"]`."""
    sums: "Tensor"
    """(B,) summed over each sequence."""
    lengths: "Tensor"
    """(B,) number of labeled tokens; 0 for a filler sequence."""
    mean_logits: "Tensor"
    """(B,) the mean logit over the vocabulary, averaged over these tokens, without gradients."""


def sequence_logps(models: Models, batch: Mapping[str, Any]) -> SequenceLogps:
    """The policy's log-probabilities of the labeled tokens of the batch."""
    from luthier.model.heads.output_head import token_logps

    tokens, mean_logits = token_logps(
        models.policy, models.head, model_inputs(batch), batch["positions"], batch["targets"]
    )
    lengths = num_targets(batch)
    mean = summed_by_sequence(mean_logits, batch) / lengths.clamp(min=1)
    return SequenceLogps(tokens, summed_by_sequence(tokens, batch), lengths, mean)


def summed_by_sequence(values: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) -> (B,)."""
    return summed(values, batch["target_rows"], batch["ends"].numel())


def num_targets(batch: Mapping[str, Any]) -> "Tensor":
    """(B,) number of labeled tokens of each sequence."""
    return counted(batch["target_rows"], batch["ends"].numel())
