"""EETQ: 8-bit integers, one scale per output row, multiplied by the kernels of https://github.com/NetEase-FuXi/EETQ.

transformers fetches the kernels through the library `kernels`, and peft knows the layers by the library `eetq`. They
run on NVIDIA GPUs only.
"""

from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, Rules
from luthier.model.quantization import Quantizer

if TYPE_CHECKING:
    import torch

    from luthier.config.keys.quantization import QuantizationConfig

BITS = (8,)

RULES = Rules(
    (
        Rule(
            ("quantization_bit", "quantization_method"),
            "EETQ quantizes to 8 bits",
            "set quantization_bit: 8, or another quantization_method",
            lambda run: run.quantization.quantization_bit not in BITS,
        ),
    )
)


def reading(keys: "QuantizationConfig", dtype: "torch.dtype", sharded: bool) -> Any:
    from transformers import EetqConfig

    return EetqConfig("int8")


QUANTIZER = Quantizer(
    name="eetq", bits=BITS, libraries=("eetq", "kernels"), extra="eetq", check=RULES, reading=reading, needs_gpu=True
)
