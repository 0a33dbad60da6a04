"""Keys of the alternative losses of `stage: sft`."""

from dataclasses import dataclass

from luthier.config.fields import refused

_REMEDY = "leave it out: the loss is the cross-entropy of the labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class DftConfig:
    use_dft_loss: bool = refused(False, "the DFT loss is not part of this version", _REMEDY)
    """Weigh the loss of each token by its own probability (https://arxiv.org/abs/2508.05629)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsftConfig:
    use_asft_loss: bool = refused(False, "the ASFT loss is not part of this version", _REMEDY)
    """The DFT loss with a pull towards the base model."""
    asft_alpha: float = 0.1
    """Strength of that pull."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EaftConfig:
    use_eaft_loss: bool = refused(False, "the EAFT loss is not part of this version", _REMEDY)
    """Weigh the loss of each token by the entropy of the prediction."""
    eaft_alpha: float = 1.0
    """Exponent of the entropy."""
