"""ASFT, anchored supervised fine-tuning: the loss of DFT and a pull towards a reference model.

    sum_t [ - sg(p_t) log p_t + alpha KL(R_t || P_t) ]

with P the policy, R the reference, p_t the probability of the given token, sg without gradients
(https://arxiv.org/abs/2509.23753). Both are taken over the learned tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.model.types import Models
from luthier.stages import LossOutput
from luthier.stages._beside import loss_beside
from luthier.stages._divergence import forward_kl

if TYPE_CHECKING:
    from torch import Tensor


def anchored_loss(models: Models, batch: Mapping[str, Any], *, alpha: float) -> LossOutput:
    """The sum over the learned tokens; `reference_kl` is KL(R || P)."""
    targets = batch["targets"]

    def compare(own: "Tensor", reference: "Tensor", part: slice) -> "tuple[Tensor, Tensor]":
        logps = own.log_softmax(-1).gather(-1, targets[part, None]).squeeze(-1)
        apart = forward_kl(own, reference)
        return alpha * apart - logps.detach().exp() * logps, apart

    return loss_beside(models, batch, "reference", compare)
