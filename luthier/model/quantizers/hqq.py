"""HQQ, half-quadratic quantization (https://mobiusml.github.io/hqq_blog): 1 to 8 bits, without calibration data.

w = (q - z) s in groups of 64 weights that lie under one another (axis 0); z is found by minimising the error under a
norm that forgives outliers. transformers 5 no longer quantises with HQQ, so the layers of the library are put in here.
"""

from typing import TYPE_CHECKING, Any

from luthier.config.rules import Rule, Rules
from luthier.model.quantizers import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.config.quantization import QuantizationConfig

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64

RULES = Rules(
    (
        Rule(
            ("quantization_bit", "quantization_method"),
            f"HQQ quantises to {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits",
            "give one of these",
            lambda run: run.quantization.quantization_bit not in BITS,
        ),
    )
)


def linear(
    layer: "nn.Linear", keys: "QuantizationConfig", dtype: "torch.dtype", device: "torch.device"
) -> "nn.Module | None":
    """None if the weights do not go into whole groups."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    if layer.weight.numel() % GROUP_SIZE:
        return None
    options: Any = BaseQuantizeConfig(nbits=keys.quantization_bit, group_size=GROUP_SIZE, axis=0)
    return HQQLinear(layer, options, compute_dtype=dtype, device=str(device))


QUANTIZER = Quantizer(name="hqq", bits=BITS, libraries=("hqq",), extra="hqq", check=RULES, linear=linear)
