"""bitsandbytes 0.50 on CPUs: two side effects of a forward pass that break training.

With AVX-512 BF16, `Linear4bit` re-packs its weight for generation when it is first called in evaluation mode, and never
packs it back. From then on it computes in bfloat16, whatever the compute dtype, and its input gets no gradient:
training continues, and the loss hardly falls.
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py `Linear4bit.forward`

`Linear8bitLt` takes the scales away from its weight at the first pass; peft, which moves a weight on the CPU to another
device and back whenever DoRA asks for it, then has none to give back.
https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/integrations.py `dequantize_module_weight`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def prevent_repacking(model: "nn.Module") -> None:
    """4-bit layers stay as they are packed, and so keep precision and gradient; 8-bit weights keep their scales."""
    for module in model.modules():
        layer: Any = module
        if type(layer).__module__ != "bitsandbytes.nn.modules":
            continue
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False
        elif type(layer).__name__ == "Linear8bitLt":
            layer.init_8bit_state = lambda layer=layer: _share_scales(layer)


def _share_scales(layer: Any) -> None:
    layer.state.CB, layer.state.SCB = layer.weight.CB, layer.weight.SCB
    layer.weight.CB = None
