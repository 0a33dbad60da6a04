"""The keys that name a reference model, for the stages that have one."""

from dataclasses import dataclass

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    ref_model: str | None = None
    """The reference model; unset takes the model as training begins, adapters included."""
    ref_model_adapters: tuple[str, ...] = ()
    """Adapters of the reference model, merged in this order."""
    ref_model_quantization_bit: int | None = refused(
        None, "loading the reference model with fewer bits is not part of this version", "leave it out"
    )
    """Bits to load the reference model with."""
