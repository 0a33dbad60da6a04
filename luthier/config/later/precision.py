"""Keys of training with 8-bit floating point numbers."""

from dataclasses import dataclass

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Config:
    fp8: bool = refused(False, "FP8 training is not part of this version", "use bf16: true")
    """Multiply matrices in 8-bit floating point."""
    fp8_backend: str = "auto"
    """Library that does it: auto, torchao, te or msamp."""
    fp8_enable_fsdp_float8_all_gather: bool = False
    """Exchange weights between devices in 8 bits."""
