"""Losses that compare the predictions of the policy with those of a frozen model, token by token."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from luthier.data.collate import model_inputs
from luthier.model.types import Models
from luthier.stages import LossOutput
from luthier.stages._causal import with_router_loss

if TYPE_CHECKING:
    from torch import Tensor

Compare = Callable[["Tensor", "Tensor", slice], "tuple[Tensor, Tensor]"]
"""(policy logits (b, V), frozen model's logits (b, V), slice of the K targets) -> loss and divergence, (b,) each."""


def loss_against_frozen(models: Models, batch: Mapping[str, Any], name: str, compare: Compare) -> LossOutput:
    """The loss that `compare` computes from the policy and the frozen model `name`, summed over the labeled tokens.

    The metric `<name>_kl` is the mean divergence. V is the smaller of the two vocabularies: embeddings may be padded
    to different sizes, and the extra rows are not tokens.
    """
    from luthier.model.heads.objective import predictions_at, summed_objective

    inputs, positions = model_inputs(batch), batch["positions"]
    frozen = models.frozen[name]
    with frozen.running() as network:
        target = predictions_at(network, frozen.head, inputs, positions)
    own = predictions_at(models.policy, models.head, inputs, positions)
    vocab_size = min(own.vocab_size, target.vocab_size)
    weights, kl = batch.get("weights"), positions.new_zeros((), dtype=own.hidden_or_logits.dtype).float()

    def objective(logits: "Tensor", of_frozen: "Tensor", part: slice) -> "Tensor":
        nonlocal kl
        values, divergence = compare(logits[:, :vocab_size], of_frozen[:, :vocab_size], part)
        kl = kl + divergence.detach().sum()
        return values if weights is None else values * weights[part]

    output = LossOutput(summed_objective(own, objective, target), {f"{name}_kl": (kl, positions.numel())})
    return with_router_loss(models, output, batch)
