"""GaLore (https://arxiv.org/abs/2403.03507): the optimizer works on gradients projected to a low-rank subspace.

    R = P^T G          N = optimizer(R)          W <- W - eta * scale * P N

for a weight W of m rows and n columns. P holds the first r left singular vectors of a gradient and is recomputed every
`galore_update_interval` steps (or Q from the right, or both; `galore_proj_type`). The moments then have r n numbers
instead of m n. As in the paper, they are kept when P changes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.rules.engine import Rules, at_least
from luthier.training.optimizers import (
    ANY_BASE,
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
class GaloreConfig:
    use_galore: bool = False
    """Project gradients to a low rank before the optimizer step (https://arxiv.org/abs/2403.03507)."""
    galore_target: tuple[str, ...] = ("all",)
    """Parts of the names of linear layers whose gradients are projected; `all`: every layer except the output head."""
    galore_rank: int = 16
    """Rank of the projection."""
    galore_update_interval: int = 200
    """Steps between updates of the projection."""
    galore_scale: float = 2.0
    """Factor on the projected update."""
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Side that is projected: the shorter, the longer, the columns, the rows, or both."""
    galore_layerwise: bool = False
    """Update each parameter as soon as its gradient is computed, and free the gradient."""


RULES = Rules(
    (
        only_optimizer("use_galore"),
        *requires_whole_weights("use_galore"),
        whole_model("use_galore"),
        requires_optim("use_galore", ANY_BASE),
        better_in_16_bits("use_galore"),
        names_targets("galore", "galore_target"),
        at_least("optimizers.galore", "galore_rank", 1),
        at_least("optimizers.galore", "galore_update_interval", 1),
        at_least("optimizers.galore", "galore_scale", 0),
        *layerwise("galore", "galore_layerwise"),
    )
)


def build(model: "nn.Module", args: "TrainingArguments", config: GaloreConfig) -> "TorchOptimizer":
    """Wraps the optimizer of `optim`. Raises `ModelError` for a target that no module has."""
    from luthier.training.optimizers._combined import step_in_backward
    from luthier.training.optimizers._galore import GaLore
    from luthier.training.optimizers._groups import base_optimizer, parameter_groups
    from luthier.training.optimizers._low_rank import projected_weights

    chosen = projected_weights(model, config.galore_target, "galore_target")
    kinds = parameter_groups(model, args.weight_decay, lambda name, weight: weight in chosen)
    groups = [{**group, "projected": projected} for projected, members in kinds.items() for group in members]
    inner = base_optimizer(model, args)

    def make(groups: list[dict[str, Any]]) -> "TorchOptimizer":
        return GaLore(
            groups,
            inner,
            lr=args.learning_rate,
            rank=config.galore_rank,
            update_interval=config.galore_update_interval,
            scale=config.galore_scale,
            proj_type=config.galore_proj_type,
        )

    return step_in_backward(groups, make) if config.galore_layerwise else make(groups)


OPTIMIZER = Optimizer(
    name="galore",
    switch="use_galore",
    config=GaloreConfig,
    build=build,
    check=RULES,
    phases=renewing_phases("galore_update_interval"),
    frees_gradients=lambda config: config.galore_layerwise,
)
