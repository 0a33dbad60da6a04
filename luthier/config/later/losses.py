"""Keys of a loss of `stage: sft` to come."""

from dataclasses import dataclass

from luthier.config.fields import refused

_REMEDY = "leave it out: the loss is the cross-entropy of the labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class AsftConfig:
    use_asft_loss: bool = refused(False, "the ASFT loss is not part of this version", _REMEDY)
    """The DFT loss with a pull towards the base model."""
    asft_alpha: float = 0.1
    """Strength of that pull."""
