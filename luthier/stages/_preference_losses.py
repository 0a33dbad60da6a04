"""The losses of `stage: dpo`, each a pure function of two numbers per pair.

P pairs of a chosen answer y_w and a rejected answer y_l to a prompt x; pi is the policy, r the reference. A loss takes
(P,) d_w and (P,) d_l and returns (P,) losses. The table `LOSSES` says what d is for each loss:

    ratio        log pi(y | x) - log r(y | x)
    mean ratio   ratio / number of tokens of y
    mean logp    log pi(y | x) / number of tokens of y      (no reference)

beta is `pref_beta`, s the logistic function, eps `dpo_label_smoothing`, gamma `simpo_gamma`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid(d_w: "Tensor", d_l: "Tensor", *, beta: float, label_smoothing: float = 0.0) -> "Tensor":
    """-(1 - eps) log s(z) - eps log s(-z) with z = beta (d_w - d_l).

    DPO (https://arxiv.org/abs/2305.18290, eq. 7). eps is the probability that the labels of a pair are flipped
    (cDPO, https://ericmitchell.ai/cdpo.pdf).
    """
    from torch.nn.functional import logsigmoid

    z = beta * (d_w - d_l)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def robust(d_w: "Tensor", d_l: "Tensor", *, beta: float, label_smoothing: float = 0.0) -> "Tensor":
    """(-(1 - eps) log s(z) + eps log s(-z)) / (1 - 2 eps) with z = beta (d_w - d_l).

    An unbiased estimate of the DPO loss on clean labels when a share eps of the labels is flipped
    (https://arxiv.org/abs/2403.00409).
    """
    from torch.nn.functional import logsigmoid

    z = beta * (d_w - d_l)
    return (-(1 - label_smoothing) * logsigmoid(z) + label_smoothing * logsigmoid(-z)) / (1 - 2 * label_smoothing)


def hinge(d_w: "Tensor", d_l: "Tensor", *, beta: float) -> "Tensor":
    """max(0, 1 - beta (d_w - d_l)): SLiC (https://arxiv.org/abs/2305.10425) in the form of
    https://arxiv.org/abs/2309.06657.
    """
    return (1 - beta * (d_w - d_l)).relu()


def ipo(d_w: "Tensor", d_l: "Tensor", *, beta: float) -> "Tensor":
    """(d_w - d_l - 1 / (2 beta))^2 on mean ratios: IPO (https://arxiv.org/abs/2310.12036, eq. 17)."""
    return (d_w - d_l - 1 / (2 * beta)) ** 2


def kto_pair(d_w: "Tensor", d_l: "Tensor", *, beta: float, chosen_kl: float, rejected_kl: float) -> "Tensor":
    """1/2 (1 - s(beta (d_w - KL_l))) + 1/2 (1 - s(beta (KL_w - d_l))): KTO on pairs (https://arxiv.org/abs/2402.01306).

    KL_w and KL_l are the means of d_w and of d_l over the optimizer step, at least 0 and without gradient. Each side
    uses the KL estimated from the answers of the other side.
    """
    return 1 - 0.5 * (beta * (d_w - rejected_kl)).sigmoid() - 0.5 * (beta * (chosen_kl - d_l)).sigmoid()


def orpo(d_w: "Tensor", d_l: "Tensor", *, beta: float) -> "Tensor":
    """-d_w - beta log s(log odds(d_w) - log odds(d_l)), odds(p) = p / (1 - p), on mean logps.

    ORPO (https://arxiv.org/abs/2403.07691, eq. 6 and 7): the sft loss of the chosen answer and the odds ratio.
    """
    return -d_w + beta * odds_ratio(d_w, d_l)


def odds_ratio(d_w: "Tensor", d_l: "Tensor") -> "Tensor":
    """-log s(log odds(d_w) - log odds(d_l)), the second term of `orpo`."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid((d_w - d_l) - (_log1mexp(d_w) - _log1mexp(d_l)))


def _log1mexp(x: "Tensor") -> "Tensor":
    """log(1 - exp(x)) for x <= 0; finite at 0, where a probability has been rounded to 1."""
    import math

    import torch

    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # Each form is accurate where the other one cancels; the unused one must not make the gradient NaN.
    near = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    return torch.where(x > -math.log(2), near, far)


def simpo(d_w: "Tensor", d_l: "Tensor", *, beta: float, gamma: float) -> "Tensor":
    """-log s(beta (d_w - d_l) - gamma) on mean logps: SimPO (https://arxiv.org/abs/2405.14734, eq. 6)."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (d_w - d_l) - gamma)


def exo_pair(d_w: "Tensor", d_l: "Tensor", *, beta: float, label_smoothing: float) -> "Tensor":
    """s(z) (log s(z) - log(1 - eps)) + s(-z) (log s(-z) - log eps) with z = beta (d_w - d_l).

    EXO (https://arxiv.org/abs/2402.00856, eq. 16): the reverse KL to the preference distribution (1 - eps, eps).
    """
    import math

    from torch.nn.functional import logsigmoid

    z = beta * (d_w - d_l)
    first = z.sigmoid() * (logsigmoid(z) - math.log1p(-label_smoothing))
    return first + (-z).sigmoid() * (logsigmoid(-z) - math.log(label_smoothing))


def bco_pair(d_w: "Tensor", d_l: "Tensor", *, beta: float, mean_reward: float) -> "Tensor":
    """-log s(beta d_w - delta) - log s(-(beta d_l - delta)): BCO (https://arxiv.org/abs/2404.04656).

    delta = `mean_reward`, the mean of beta d_w and beta d_l over all pairs up to this optimizer step, without gradient.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * d_w - mean_reward) - logsigmoid(mean_reward - beta * d_l)


def apo_zero(d_w: "Tensor", d_l: "Tensor", *, beta: float) -> "Tensor":
    """1 - s(beta d_w) + s(beta d_l): raises chosen answers and lowers rejected ones (APO,
    https://arxiv.org/abs/2408.06266).
    """
    return 1 - (beta * d_w).sigmoid() + (beta * d_l).sigmoid()


def apo_down(d_w: "Tensor", d_l: "Tensor", *, beta: float) -> "Tensor":
    """s(beta d_w) + 1 - s(beta (d_w - d_l)): lowers both, rejected answers more (APO,
    https://arxiv.org/abs/2408.06266).

    For a policy that is already better than the chosen answers.
    """
    return (beta * d_w).sigmoid() + 1 - (beta * (d_w - d_l)).sigmoid()


def sppo(d_w: "Tensor", d_l: "Tensor", *, beta: float) -> "Tensor":
    """(d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2: SPPO (https://arxiv.org/abs/2405.00675, eq. 4.7).

    beta is 1 / eta of the paper; the chosen answer is preferred with probability 1.
    """
    return (d_w - 1 / (2 * beta)) ** 2 + (d_l + 1 / (2 * beta)) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    """A loss and its inputs."""

    of: "Callable[..., Tensor]"
    """(d_w, d_l, *, beta, and a number for each of `reads`) -> (P,)."""
    has_reference: bool = True
    """Whether d_w and d_l are log-ratios to the reference; else they are log-probabilities."""
    is_mean: bool = False
    """Whether d_w and d_l are means over the tokens of an answer; else they are sums."""
    reads: tuple[str, ...] = ()
    """Its other arguments: those in `KNOBS` come from the run file, those in `MEANS` from the whole optimizer step."""


KNOBS = {"label_smoothing": "dpo_label_smoothing", "gamma": "simpo_gamma"}
"""Argument name -> run-file key."""
MEANS = ("mean_reward", "chosen_kl", "rejected_kl")

LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(of=sigmoid, reads=("label_smoothing",)),
    "robust": PairLoss(of=robust, reads=("label_smoothing",)),
    "hinge": PairLoss(of=hinge),
    "ipo": PairLoss(of=ipo, is_mean=True),
    "kto_pair": PairLoss(of=kto_pair, reads=("chosen_kl", "rejected_kl")),
    "orpo": PairLoss(of=orpo, has_reference=False, is_mean=True),
    "simpo": PairLoss(of=simpo, has_reference=False, is_mean=True, reads=("gamma",)),
    "exo_pair": PairLoss(of=exo_pair, reads=("label_smoothing",)),
    "bco_pair": PairLoss(of=bco_pair, reads=("mean_reward",)),
    "apo_zero": PairLoss(of=apo_zero),
    "apo_down": PairLoss(of=apo_down),
    "sppo": PairLoss(of=sppo),
}
"""`pref_loss` -> the loss."""
