"""Keys that load the base model with fewer bits."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    quantization_bit: int | None = refused(
        None,
        "loading a model with fewer bits is not part of this version",
        "leave it out, and use bf16: true to save memory",
    )
    """Bits to quantise the weights to while loading."""
    quantization_method: Literal["bnb", "hqq", "eetq", "gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8"] = "bnb"
    """Who quantises."""
    quantization_type: Literal["fp4", "nf4"] = "nf4"
    """Number type of 4-bit weights in bitsandbytes."""
    double_quantization: bool = True
    """Quantise the scales as well."""
    quantization_device_map: Literal["auto"] | None = None
    """Spread 4-bit weights over all devices, for generation only."""
