"""bitsandbytes: 4 bits in blocks of 64 weights (QLoRA, https://arxiv.org/abs/2305.14314), or 8 bits in rows
(LLM.int8(), https://arxiv.org/abs/2208.07339).

4 bits: w = absmax(block) c[q], where c are the 16 values of NF4 (quantiles of a normal distribution) or FP4. With
`double_quantization` the absmax of the blocks are 8-bit numbers themselves.
8 bits: columns of the input with values above 6 are multiplied in 16 bits, the others in 8.
"""

from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rule, Rules
from luthier.model.quantization import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.config.keys.quantization import QuantizationConfig

BITS = (4, 8)

RULES = Rules(
    (
        Rule(
            ("quantization_bit", "quantization_method"),
            "bitsandbytes quantizes to 4 or 8 bits",
            "set quantization_bit: 4 or 8, or quantization_method: hqq",
            lambda run: run.quantization.quantization_bit not in BITS,
        ),
    )
)


def reading(keys: "QuantizationConfig", dtype: "torch.dtype", sharded: bool) -> Any:
    """For `from_pretrained`. FSDP and ZeRO-3 shard tensors of one dtype only, so the bits are stored in that dtype."""
    import torch
    from transformers import BitsAndBytesConfig

    if keys.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=keys.double_quantization,
        bnb_4bit_quant_type=keys.quantization_type,
        bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
    )


def linear(layer: "nn.Linear", keys: "QuantizationConfig", dtype: "torch.dtype", device: "torch.device") -> "nn.Module":
    import torch
    from bitsandbytes import nn as layers

    library: Any = layers
    size = (layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.weight.detach()
    quantized: Any
    with torch.device("meta"):
        if keys.quantization_bit == 8:
            quantized = library.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
        else:
            quantized = library.Linear4bit(
                *size, dtype, compress_statistics=keys.double_quantization, quant_type=keys.quantization_type
            )
    if keys.quantization_bit == 8:
        quantized.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        options = {"quant_type": keys.quantization_type, "compress_statistics": keys.double_quantization}
        four_bits = library.Params4bit(weight, requires_grad=False, module=quantized, **options)
        quantized.weight = four_bits.to(device)
    if layer.bias is not None:
        quantized.bias = torch.nn.Parameter(layer.bias.detach().to(device, dtype), requires_grad=False)
    return quantized


QUANTIZER = Quantizer(
    name="bnb", bits=BITS, libraries=("bitsandbytes",), extra="bnb", check=RULES, reading=reading, linear=linear
)
