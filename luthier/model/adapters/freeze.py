"""Train a few whole layers and leave the rest as it is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeConfig:
    freeze_trainable_layers: int = 2
    """How many layers learn: the last n if positive, the first n if negative."""
    freeze_trainable_modules: tuple[str, ...] = ("all",)
    """Names of the modules inside those layers that learn, or `all`."""
    freeze_extra_modules: tuple[str, ...] = ()
    """Names of modules outside the layers that learn too, e.g. `lm_head`."""
