"""Muon (https://kellerjordan.github.io/posts/muon, https://arxiv.org/abs/2502.16982), as implemented in torch.

    B <- mu B + G        O = NewtonSchulz(G + mu B), about U V^T of its SVD        W <- W - 0.2 eta sqrt(max(m, n)) O

for each hidden weight W of shape (m, n). The factor matches the update size of AdamW, so its learning rates and weight
decays can be kept. Embeddings, the output head, biases and norms are trained with AdamW.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rules
from luthier.training.optimizers import ADAMW, Optimizer, only_optimizer, requires_optim, requires_whole_weights

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonConfig:
    use_muon: bool = False
    """Orthogonalize the update of each matrix (https://arxiv.org/abs/2502.16982)."""


RULES = Rules((only_optimizer("use_muon"), *requires_whole_weights("use_muon"), requires_optim("use_muon", ADAMW)))


def build(model: "nn.Module", args: "TrainingArguments", config: MuonConfig) -> "TorchOptimizer":
    import torch

    from luthier.model.compat.muon_cpu import orthogonalizing_fast
    from luthier.training.optimizers._combined import CombinedOptimizer
    from luthier.training.optimizers._groups import base_optimizer, parameter_groups

    class Muon(torch.optim.Muon):
        def step(self, closure: Any = None) -> Any:
            with orthogonalizing_fast():
                return super().step(closure)

    groups = parameter_groups(model, args.weight_decay, is_hidden_matrix)
    parts: list[TorchOptimizer] = []
    if True in groups:
        # Each group sets its weight decay; torch's default would be 0.1.
        parts.append(Muon(groups[True], lr=args.learning_rate, adjust_lr_fn="match_rms_adamw"))
    if False in groups:
        parts.append(base_optimizer(model, args)(groups[False]))
    return CombinedOptimizer(parts)


def is_hidden_matrix(name: str, weight: "nn.Parameter") -> bool:
    return weight.ndim == 2 and not any(word in name for word in ("embed", "lm_head", "wte", "wpe"))


OPTIMIZER = Optimizer(name="muon", switch="use_muon", config=MuonConfig, build=build, check=RULES)
