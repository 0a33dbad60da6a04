"""What a method to quantize while loading is. Each other file here is one `quantization_method`.

A linear layer keeps its weight in a low-bit format and converts it to the compute dtype for each multiplication.
Embeddings, normalization and the output head stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rules

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.config.keys.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    name: str
    bits: tuple[int, ...]
    """What `quantization_bit` may be."""
    libraries: tuple[str, ...]
    """The modules that do it."""
    extra: str
    """The extra of this package that installs them."""
    check: Rules
    """Rules between keys that concern this method; checked before torch is imported."""
    reading: "Callable[[QuantizationConfig, torch.dtype, bool], Any] | None" = None
    """(keys, compute dtype, sharded between processes) -> the config by which transformers quantizes tensor after
    tensor while it reads them; None if it cannot."""
    linear: "Callable[[nn.Linear, QuantizationConfig, torch.dtype, torch.device], nn.Module | None] | None" = None
    """(layer, keys, compute dtype, device) -> the quantized layer, None for one that this method cannot take.

    For models that are in memory already; None if only transformers knows how."""
    needs_gpu: bool = False
