"""APOLLO (https://arxiv.org/abs/2412.05270): SGD with gradients scaled as AdamW would scale them.

    R = P^T G        R~ = AdamW(R)        s_j = |R~[:, j]| / |R[:, j]|        W <- W - eta * sqrt(scale) * G diag(s)

for a weight W of m rows and n columns, with a random P (m, r) of variance 1 / r, or the first singular vectors of G.
Each channel j has its own factor, or the whole matrix has one (`apollo_scale_type: tensor`; with rank 1 this is
APOLLO-Mini). The norm of an update is at most 1.01 times that of the previous one. Only the moments of R are kept: r n
numbers instead of m n. The square root follows the authors' library, so a scale means the same here as there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.rules.engine import Rules, at_least
from luthier.training.optimizers import (
    ADAMW,
    Optimizer,
    better_in_16_bits,
    layerwise,
    names_targets,
    only_optimizer,
    renewing_phases,
    requires_optim,
    requires_whole_weights,
    whole_model,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class ApolloConfig:
    use_apollo: bool = False
    """Scale gradients as a low-rank AdamW would (https://arxiv.org/abs/2412.05270)."""
    apollo_target: tuple[str, ...] = ("all",)
    """Parts of the names of linear layers whose gradients are scaled; `all`: every layer except the output head."""
    apollo_rank: int = 16
    """Rank of the projection."""
    apollo_update_interval: int = 200
    """Steps between updates of the projection."""
    apollo_scale: float = 32.0
    """The update is multiplied by the square root of this."""
    apollo_proj: Literal["svd", "random"] = "random"
    """How the projection is made."""
    apollo_proj_type: Literal["std", "right", "left"] = "std"
    """Side that is projected: the shorter, the columns or the rows."""
    apollo_scale_type: Literal["channel", "tensor"] = "channel"
    """Whether each channel or the whole matrix has its own scale."""
    apollo_layerwise: bool = False
    """Update each parameter as soon as its gradient is computed, and free the gradient."""
    apollo_scale_front: bool = False
    """Apply the scale before the norm of the update is limited, not after."""


RULES = Rules(
    (
        only_optimizer("use_apollo"),
        *requires_whole_weights("use_apollo"),
        whole_model("use_apollo"),
        requires_optim("use_apollo", ADAMW),
        better_in_16_bits("use_apollo"),
        names_targets("apollo", "apollo_target"),
        at_least("optimizers.apollo", "apollo_rank", 1),
        at_least("optimizers.apollo", "apollo_update_interval", 1),
        at_least("optimizers.apollo", "apollo_scale", 0),
        *layerwise("apollo", "apollo_layerwise"),
    )
)


def build(model: "nn.Module", args: "TrainingArguments", config: ApolloConfig) -> "TorchOptimizer":
    """Raises `ModelError` for a target that no module has."""
    from luthier.training.optimizers._apollo import Apollo
    from luthier.training.optimizers._combined import step_in_backward
    from luthier.training.optimizers._groups import parameter_groups
    from luthier.training.optimizers._low_rank import projected_weights

    chosen = projected_weights(model, config.apollo_target, "apollo_target")
    kinds = parameter_groups(model, args.weight_decay, lambda name, weight: weight in chosen)
    groups = [{**group, "projected": projected} for projected, members in kinds.items() for group in members]
    numbers = {weight: number for number, weight in enumerate(model.parameters())}

    def make(groups: list[dict[str, Any]]) -> "TorchOptimizer":
        return Apollo(
            groups,
            numbers=numbers,
            seed=args.seed,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            rank=config.apollo_rank,
            update_interval=config.apollo_update_interval,
            scale=config.apollo_scale,
            is_random=config.apollo_proj == "random",
            proj_type=config.apollo_proj_type,
            by_channel=config.apollo_scale_type == "channel",
            scales_first=config.apollo_scale_front,
        )

    return step_in_backward(groups, make) if config.apollo_layerwise else make(groups)


OPTIMIZER = Optimizer(
    name="apollo",
    switch="use_apollo",
    config=ApolloConfig,
    build=build,
    check=RULES,
    phases=renewing_phases("apollo_update_interval"),
    frees_gradients=lambda config: config.apollo_layerwise,
)
