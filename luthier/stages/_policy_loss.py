"""The clipped policy loss that ppo and grpo share, and the clipped value loss of ppo.

https://arxiv.org/abs/1707.06347, eq. 7: with the ratio rho = pi(token) / pi_old(token) and the advantage A,

    loss = -min(rho A, clip(rho, 1 - low, 1 + high) A)

K tokens in a batch. The ratio may be that of a whole answer; all its tokens then share it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.stages._logps import num_targets, summed_by_sequence

if TYPE_CHECKING:
    from torch import Tensor


def token_ratio(log_ratios: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) the log-ratio of each token."""
    return log_ratios


def mean_ratio(log_ratios: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) the mean over the tokens of the answer (GSPO, https://arxiv.org/abs/2507.18071, eq. 7)."""
    means = summed_by_sequence(log_ratios, batch) / num_targets(batch).clamp(min=1)
    return means[batch["target_rows"]]


def answer_ratio(log_ratios: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) the sum over the tokens of the answer: the ratio of the answer as one action."""
    return summed_by_sequence(log_ratios, batch)[batch["target_rows"]]


def clipped_loss(log_ratios: "Tensor", advantages: "Tensor", *, low: float, high: float) -> "tuple[Tensor, Tensor]":
    """(K,) losses, and (K,) whether the token was clipped, without gradients."""
    ratios = log_ratios.exp()
    unclipped, clipped = ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages
    return -unclipped.minimum(clipped), (clipped < unclipped).detach()


def clipped_value_loss(values: "Tensor", old_values: "Tensor", returns: "Tensor", *, clip_range: float) -> "Tensor":
    """(K,) 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * (values - returns).square().maximum((clipped - returns).square())


def reference_kl(logps: "Tensor", reference: "Tensor") -> "Tensor":
    """(K,) exp(r - p) - (r - p) - 1, the non-negative estimate of KL(pi || reference) known as k3."""
    log_ratios = reference - logps
    return log_ratios.exp() - log_ratios - 1
