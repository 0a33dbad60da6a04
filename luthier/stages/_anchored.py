"""ASFT, anchored supervised fine-tuning: the loss of DFT and a pull towards a reference model.

    sum_t [ - sg(p_t) log p_t + alpha KL(R_t || P_t) ]

with P the policy, R the reference, p_t the probability of the given token, sg without gradients
(https://arxiv.org/abs/2509.23753). Both are taken over the learned tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.data.collate import model_inputs
from luthier.model.types import Models
from luthier.stages import LossOutput
from luthier.stages._causal import count_targets, with_router_loss
from luthier.stages._divergence import forward_kl

if TYPE_CHECKING:
    from torch import Tensor


def anchored_loss(models: Models, batch: Mapping[str, Any], *, alpha: float) -> LossOutput:
    """The sum over the learned tokens; `reference_kl` is KL(R || P)."""
    from luthier.model.objective import predictions_at, summed_objective

    inputs, positions, targets = model_inputs(batch), batch["positions"], batch["targets"]
    reference = models.companions["reference"]
    with reference.asked() as network:
        anchor = predictions_at(network, reference.head, inputs, positions)
    policy = predictions_at(models.policy, models.head, inputs, positions)
    num_words = min(policy.num_words, anchor.num_words)
    weights, kl = batch.get("weights"), positions.new_zeros((), dtype=policy.values.dtype).float()

    def objective(logits: "Tensor", part: slice) -> "Tensor":
        nonlocal kl
        logps = logits.log_softmax(-1).gather(-1, targets[part, None]).squeeze(-1)
        apart = forward_kl(logits[:, :num_words], anchor.logits(part)[:, :num_words])
        kl = kl + apart.detach().sum()
        values = alpha * apart - logps.detach().exp() * logps
        return values if weights is None else values * weights[part]

    total = summed_objective(policy, objective)
    output = LossOutput(total, {"reference_kl": (kl, positions.numel())})
    return with_router_loss(models, output, count_targets(batch))
