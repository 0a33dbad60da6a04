"""Losses of whole distributions at the labelled positions, with the logits of one chunk of positions at a time.

K labelled positions, H hidden size, V vocabulary, c positions of a chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.model.heads import output_head
from luthier.model.heads.output_head import OutputHead, hidden_at, logits_at

if TYPE_CHECKING:
    from torch import Tensor, nn

Objective = Callable[["Tensor", slice], "Tensor"]
"""(logits (c, V) in float32 or better, which positions of K these are) -> a loss for each of them, (c,)."""


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
        import torch

        values = self.hidden_or_logits[part]
        if self.weight is not None:
            bias = None if self.bias is None else self.bias.to(values.dtype)
            values = torch.nn.functional.linear(values, self.weight.to(values.dtype), bias)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    @property
    def vocab_size(self) -> int:
        return self.hidden_or_logits.shape[-1] if self.weight is None else self.weight.shape[0]


def predictions_at(model: "nn.Module", head: OutputHead, inputs: Mapping[str, Any], positions: "Tensor") -> Predictions:
    """inputs and positions as in `luthier.model.heads.output_head.summed_loss`."""
    import torch

    if head.linear is None:
        return Predictions(logits_at(model, head, inputs, positions))
    hidden = hidden_at(model, head, inputs, positions)
    if torch.is_grad_enabled():
        return Predictions(hidden, head.linear.weight, head.linear.bias)
    # The initial policy is swapped in for a moment only; what is detached keeps its value.
    bias = None if head.linear.bias is None else head.linear.bias.detach()
    return Predictions(hidden, head.linear.weight.detach(), bias)


def summed_objective(predictions: Predictions, objective: Objective) -> "Tensor":
    """sum_k objective(logits_k), a scalar with gradients.

    The gradient of each chunk is taken at once in the forward pass, while its logits are there, and only scaled in the
    backward pass.
    """
    if predictions.weight is None:
        return objective(predictions.logits(slice(None)), slice(None)).sum()
    return _chunked(predictions, objective)


def _chunked(predictions: Predictions, objective: Objective) -> "Tensor":
    import torch

    class ChunkedObjective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias):
            sources = (hidden, weight, bias)
            needs = [tensor is not None and need for tensor, need in zip(sources, ctx.needs_input_grad, strict=True)]
            grads = [torch.zeros_like(t) if need else None for t, need in zip(sources, needs, strict=True)]
            size = max(64, output_head.CHUNK_ELEMENTS // weight.shape[0])
            total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                logits = Predictions(hidden, weight, bias).logits(part)
                if not any(needs):
                    total += objective(logits, part).sum()
                    continue
                with torch.enable_grad():
                    loss = objective(logits.requires_grad_(), part).sum()
                (d_logits,) = torch.autograd.grad(loss, logits)
                total += loss.detach()
                d_logits = d_logits.to(hidden.dtype)
                if grads[0] is not None:
                    grads[0][part] = d_logits @ weight.to(hidden.dtype)
                if grads[1] is not None:
                    grads[1] += (d_logits.T @ hidden[part]).to(weight.dtype)
                if grads[2] is not None:
                    grads[2] += d_logits.sum(0).to(bias.dtype)
            ctx.grads = grads
            return total

        @staticmethod
        def backward(ctx, d_total):
            return tuple(None if grad is None else grad * d_total.to(grad.dtype) for grad in ctx.grads)

    total: Tensor = ChunkedObjective.apply(predictions.hidden_or_logits, predictions.weight, predictions.bias)
    return total
