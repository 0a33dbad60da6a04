"""Losses of sft that count each token by what the model itself thinks of it: sum_t w_t (- log p(x_t | x_<t)).

K tokens, V vocabulary. No gradient goes through w.
"""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.model.kernels.chunked_head import Weigh

NUM_LIKELY = 20
"""How many of the likeliest tokens stand for the whole distribution in `by_entropy`."""
ENTROPY_SCALE = 3.0
"""About the largest entropy that so many tokens can have, ln 20 = 2.996."""


def by_probability(logits: "Tensor", log_normalizer: "Tensor", targets: "Tensor") -> "Tensor":
    """w = p(x_t), dynamic fine-tuning (https://arxiv.org/abs/2508.05629, eq. 9). logits (K, V) -> (K,)."""
    return (logits.gather(-1, targets[:, None]) - log_normalizer).squeeze(-1).exp()


def by_entropy(logits: "Tensor", log_normalizer: "Tensor", targets: "Tensor", *, alpha: float) -> "Tensor":
    """w = (H / 3)^alpha, H the entropy among the 20 likeliest tokens (entropy-adaptive fine-tuning). -> (K,)."""
    import torch

    likely = logits.topk(min(NUM_LIKELY, logits.shape[-1]), dim=-1).values.softmax(-1)
    return (torch.special.entr(likely).sum(-1) / ENTROPY_SCALE) ** alpha


def chosen_weigh(*, use_dft_loss: bool, use_eaft_loss: bool, eaft_alpha: float) -> "Weigh | None":
    if use_dft_loss:
        return by_probability
    return partial(by_entropy, alpha=eaft_alpha) if use_eaft_loss else None
