"""Keys of the optimizers to come; one class per switch."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class GaloreConfig:
    use_galore: bool = refused(
        False, "GaLore is not part of this version", "use optim: galore_adamw and optim_target_modules of transformers"
    )
    """Project gradients to a low rank before the optimizer sees them (https://arxiv.org/abs/2403.03507)."""
    galore_target: tuple[str, ...] = ("all",)
    """Names of the modules whose gradients are projected, or `all`."""
    galore_rank: int = 16
    """Rank of the projection."""
    galore_update_interval: int = 200
    """Steps between two computations of the projection."""
    galore_scale: float = 2.0
    """Factor on the projected update."""
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Side of the matrix that is projected."""
    galore_layerwise: bool = False
    """Update each parameter as soon as its gradient is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApolloConfig:
    use_apollo: bool = refused(
        False, "APOLLO is not part of this version", "use optim: apollo_adamw and optim_target_modules of transformers"
    )
    """Scale gradients by what a low-rank optimizer would do (https://arxiv.org/abs/2412.05270)."""
    apollo_target: tuple[str, ...] = ("all",)
    """Names of the modules whose gradients are projected, or `all`."""
    apollo_rank: int = 16
    """Rank of the projection."""
    apollo_update_interval: int = 200
    """Steps between two computations of the projection."""
    apollo_scale: float = 32.0
    """Factor on the update."""
    apollo_proj: Literal["svd", "random"] = "random"
    """How the projection is made."""
    apollo_proj_type: Literal["std", "right", "left"] = "std"
    """Side of the matrix that is projected."""
    apollo_scale_type: Literal["channel", "tensor"] = "channel"
    """Whether each channel, or the whole matrix, has one scale."""
    apollo_layerwise: bool = False
    """Update each parameter as soon as its gradient is there."""
    apollo_scale_front: bool = False
    """Limit the norm of the gradient before it is scaled, not after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadamConfig:
    use_badam: bool = refused(
        False, "BAdam is not part of this version", "leave it out; finetuning_type: freeze trains some of the layers"
    )
    """Train one block of the model at a time (https://arxiv.org/abs/2404.02827)."""
    badam_mode: Literal["layer", "ratio"] = "layer"
    """Blocks are layers, or a share of the weights."""
    badam_start_block: int | None = None
    """The block that learns first."""
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] | None = "ascending"
    """Order of the blocks."""
    badam_switch_interval: int | None = 50
    """Steps that a block learns for; -1 for ever."""
    badam_update_ratio: float = 0.05
    """Share of the weights that learn, in the mode `ratio`."""
    badam_mask_mode: Literal["adjacent", "scatter"] = "adjacent"
    """Whether those weights lie together or apart."""
    badam_verbose: int = 0
    """How much is printed: 0, 1 or 2."""
