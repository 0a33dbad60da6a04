"""The clipped policy loss that ppo and grpo share, and the clipped value loss of ppo.

https://arxiv.org/abs/1707.06347, eq. 7: with the ratio rho = pi(token) / pi_old(token) and the advantage A,

    loss = -min(rho A, clip(rho, 1 - low, 1 + high) A)

K tokens of a batch. The ratio may be that of a whole answer; then all its tokens share one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.stages._logps import num_targets, summed_by_sequence

if TYPE_CHECKING:
    from torch import Tensor


def token_ratio(log_ratios: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) log-ratio of each token by itself."""
    return log_ratios


def mean_ratio(log_ratios: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) the mean over the tokens of the answer (GSPO, https://arxiv.org/abs/2507.18071, eq. 7)."""
    means = summed_by_sequence(log_ratios, batch) / num_targets(batch).clamp(min=1)
    return means[batch["target_rows"]]


def answer_ratio(log_ratios: "Tensor", batch: Mapping[str, Any]) -> "Tensor":
    """(K,) the sum over the tokens of the answer: the ratio of the answer as one action."""
    return summed_by_sequence(log_ratios, batch)[batch["target_rows"]]


def clipped_loss(log_ratios: "Tensor", advantages: "Tensor", *, low: float, high: float) -> "tuple[Tensor, Tensor]":
    """(K,) losses with gradients, and (K,) whether the clipped side was the smaller one."""
    ratios = log_ratios.exp()
    free, clipped = ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages
    return -free.minimum(clipped), (clipped < free).detach()


def clipped_value_loss(values: "Tensor", old_values: "Tensor", returns: "Tensor", *, reach: float) -> "Tensor":
    """(K,) 1/2 max((V - R)^2, (clip(V, V_old - reach, V_old + reach) - R)^2)."""
    kept = old_values + (values - old_values).clamp(-reach, reach)
    return 0.5 * (values - returns).square().maximum((kept - returns).square())


def reference_kl(logps: "Tensor", reference: "Tensor") -> "Tensor":
    """(K,) exp(r - p) - (r - p) - 1, an estimate of KL(pi || reference) that is never negative."""
    apart = reference - logps
    return apart.exp() - apart - 1
