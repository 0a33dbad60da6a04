"""Losses of whole distributions at the labeled positions, with the logits of one chunk of positions at a time.

K labeled positions, H hidden size, V vocabulary, c positions of a chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.model.heads.output_head import OutputHead, hidden_at, logits_at

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.model.kernels.chunked_head import Objective


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts at K positions."""

    hidden_or_logits: "Tensor"
    """Hidden states (K, H), or logits (K, V) where the model does more than a linear head."""
    weight: "Tensor | None" = None
    """(V, H) of the head, as it is when the model is asked; None if these are logits."""
    bias: "Tensor | None" = None

    def logits(self, part: slice) -> "Tensor":
        """(c, V), in float32 or better."""
        from luthier.model.kernels.chunked_head import at_least_float32, chunk_logits, in_format_of

        if self.weight is None:
            logits = self.hidden_or_logits[part]
            return logits.to(at_least_float32(logits.dtype))
        matrix, bias = in_format_of(self.hidden_or_logits, self.weight, self.bias)
        return chunk_logits(self.hidden_or_logits, matrix, bias, part)

    @property
    def vocab_size(self) -> int:
        return self.hidden_or_logits.shape[-1] if self.weight is None else self.weight.shape[0]


def predictions_at(model: "nn.Module", head: OutputHead, inputs: Mapping[str, Any], positions: "Tensor") -> Predictions:
    """inputs and positions as in `luthier.model.heads.output_head.summed_loss`."""
    import torch

    from luthier.model.kernels.chunked_head import in_format_of

    if head.linear is None:
        return Predictions(logits_at(model, head, inputs, positions))
    hidden = hidden_at(model, head, inputs, positions)
    if torch.is_grad_enabled():
        return Predictions(hidden, head.linear.weight, head.linear.bias)
    # The initial policy is swapped in for a moment only; what is detached keeps its value.
    bias = None if head.linear.bias is None else head.linear.bias.detach()
    return Predictions(hidden, *in_format_of(hidden, head.linear.weight.detach(), bias))


def summed_objective(predictions: Predictions, objective: "Objective", beside: Predictions) -> "Tensor":
    """sum_k objective(logits_k, logits_k of `beside`), a scalar with gradients of the first.

    The gradient of each chunk is computed in the forward pass, while its logits exist, and only scaled in the backward
    pass.
    """
    from luthier.model.kernels.chunked_head import chunked_objective

    if predictions.weight is None:
        whole = slice(None)
        return objective(predictions.logits(whole), beside.logits(whole), whole).sum()
    own = predictions.hidden_or_logits, predictions.weight, predictions.bias
    return chunked_objective(*own, objective, beside.logits)
