"""The keys that quantize a base model while it is loaded.

Rules about them stand in `luthier.config.rules.quantization`; those of one method in `luthier/model/quantization/`.
"""

from dataclasses import dataclass
from typing import Literal

from luthier.config.keys.fields import variant

CHECKPOINT_METHODS = ("gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8")
"""Names of the reference that describe prequantized checkpoints; they cannot quantize a model while loading it."""
GROWING_KEYS = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")
"""Keys that give the embeddings new rows."""


LOFTQ_FILE = "loftq.json"
"""File beside an adapter trained with `loftq_init`: how its base is quantized, by keys of this group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    quantization_bit: int | None = None
    """Quantize the linear layers of the base model to this many bits while loading it."""
    quantization_method: str = variant("bnb", also=CHECKPOINT_METHODS)
    """Quantization method: bitsandbytes (4 or 8 bits), HQQ (1 to 6, or 8) or EETQ (8)."""
    quantization_type: Literal["fp4", "nf4"] = "nf4"
    """Number format of 4-bit bitsandbytes."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit bitsandbytes."""
    quantization_device_map: Literal["auto"] | None = None
    """Spread a 4-bit bitsandbytes model over all devices, for generation only."""
