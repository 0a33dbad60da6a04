"""ASFT, anchored supervised fine-tuning: the DFT loss plus a KL penalty towards a reference model.

    sum_t [ - sg(p_t) log p_t + alpha KL(R_t || P_t) ]

with P the policy, R the reference, p_t the probability of the target token and sg the stop-gradient
(https://arxiv.org/abs/2509.23753). The sum is over the labeled tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.model.types import Models
from luthier.stages import LossOutput
from luthier.stages._against_frozen import loss_against_frozen
from luthier.stages._divergence import forward_kl

if TYPE_CHECKING:
    from torch import Tensor


def anchored_loss(models: Models, batch: Mapping[str, Any], *, alpha: float) -> LossOutput:
    """Summed over the labeled tokens; the metric `reference_kl` is KL(R || P)."""
    targets = batch["targets"]

    def compare(own: "Tensor", reference: "Tensor", part: slice) -> "tuple[Tensor, Tensor]":
        logps = own.log_softmax(-1).gather(-1, targets[part, None]).squeeze(-1)
        kl = forward_kl(own, reference)
        return alpha * kl - logps.detach().exp() * logps, kl

    return loss_against_frozen(models, batch, "reference", compare)
