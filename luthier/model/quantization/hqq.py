"""HQQ, half-quadratic quantization (https://mobiusml.github.io/hqq_blog): 1 to 8 bits, without calibration data.

w = (q - z) s in groups of 32 weights of one output (axis 1); z is found by minimizing the error under a norm that
forgives outliers. These are the groups of GGUF's 4-bit formats, so what comes from such a file is hardly rounded again.
transformers 5 no longer quantizes with HQQ, so its layers are inserted here.
"""

from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, Rules
from luthier.model.quantization import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.config.keys.quantization import QuantizationConfig

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZE = 32

RULES = Rules(
    (
        Rule(
            ("quantization_bit", "quantization_method"),
            f"HQQ quantizes to {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits",
            "give one of these",
            lambda run: run.quantization.quantization_bit not in BITS,
        ),
    )
)


def linear(
    layer: "nn.Linear", keys: "QuantizationConfig", dtype: "torch.dtype", device: "torch.device"
) -> "nn.Module | None":
    """None if the weights do not go into whole groups."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    if layer.weight.numel() % GROUP_SIZE:
        return None
    options: Any = BaseQuantizeConfig(nbits=keys.quantization_bit, group_size=GROUP_SIZE, axis=1)
    quantized = HQQLinear(layer, options, compute_dtype=dtype, device=str(device))
    if dtype == torch.float32:
        # A pair of numbers for each group: in 32 bits they would take half as much as the weights themselves.
        for name in ("scale", "zero"):
            quantized.meta[name] = quantized.meta[name].half()
    return quantized


QUANTIZER = Quantizer(name="hqq", bits=BITS, libraries=("hqq",), extra="hqq", check=RULES, linear=linear)
