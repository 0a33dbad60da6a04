"""Token weights of the sft losses DFT and EAFT: sum_t w_t (-log p(x_t | x_<t)), with w_t from the model's prediction.

K tokens, V vocabulary. No gradient flows through w.
"""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.model.kernels.chunked_head import Weigh

NUM_LIKELY = 20
"""`by_entropy` computes the entropy over this many most likely tokens."""
ENTROPY_SCALE = 3.0
"""About the maximum entropy over that many tokens, ln 20 = 2.996."""


def by_probability(logits: "Tensor", log_normalizer: "Tensor", targets: "Tensor") -> "Tensor":
    """w = p(x_t), dynamic fine-tuning (https://arxiv.org/abs/2508.05629, eq. 9). logits (K, V) -> (K,)."""
    return (logits.gather(-1, targets[:, None]) - log_normalizer).squeeze(-1).exp()


def by_entropy(logits: "Tensor", log_normalizer: "Tensor", targets: "Tensor", *, alpha: float) -> "Tensor":
    """w = (H / 3)^alpha, H the entropy over the 20 most likely tokens (entropy-adaptive fine-tuning). -> (K,)."""
    import torch

    likely = logits.topk(min(NUM_LIKELY, logits.shape[-1]), dim=-1).values.softmax(-1)
    return (torch.special.entr(likely).sum(-1) / ENTROPY_SCALE) ** alpha


def chosen_weigh(*, use_dft_loss: bool, use_eaft_loss: bool, eaft_alpha: float) -> "Weigh | None":
    if use_dft_loss:
        return by_probability
    return partial(by_entropy, alpha=eaft_alpha) if use_eaft_loss else None
