"""What bitsandbytes does to a layer that is evaluated on a CPU, and that this package keeps from it.

If a test of the plain library fails, the library has been mended, and `luthier.model.compat.bitsandbytes_cpu` can go.
"""

import pytest
import torch

from luthier.model.compat.bitsandbytes_cpu import prevent_repacking

bitsandbytes = pytest.importorskip("bitsandbytes")


def four_bits() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return torch.nn.Sequential(layer.to("cpu"))


def gradient_after_evaluation(model: torch.nn.Module) -> torch.Tensor | None:
    """d(sum of outputs) / d(input), which is the sum of the rows of the weight."""
    with torch.no_grad():
        model.eval()(torch.ones(3, 64))
    x = torch.ones(3, 64, requires_grad=True)
    out = model.train()(x).sum()
    if out.requires_grad:
        out.backward()
    return x.grad


def test_a_4_bit_layer_keeps_its_gradient_after_an_evaluation():
    model = four_bits()
    weight = bitsandbytes.functional.dequantize_4bit(model[0].weight, model[0].weight.quant_state)
    prevent_repacking(model)
    assert torch.allclose(gradient_after_evaluation(model), weight.sum(0).expand(3, 64), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_plain_bitsandbytes_loses_it():
    if not four_bits()[0].support_avx512bf16_for_cpu:
        pytest.skip("only on a CPU with AVX-512 BF16")
    gradient = gradient_after_evaluation(four_bits())
    assert gradient is None or not gradient.any()


def dora_after_a_pass(folder, prepare) -> torch.Tensor:
    """The logits of a DoRA adapter, which starts as no change, on an 8-bit model that has been asked before."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=torch.float32)
    prepare(model)
    ids = torch.arange(1, 10, device=model.device)[None]
    with torch.no_grad():
        before = model(ids).logits
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
        for _ in range(2):
            after = adapted(ids).logits
    return (after - before).abs().max() / before.abs().max()


def test_dora_on_8_bits_after_a_pass(llama_folder):
    assert dora_after_a_pass(llama_folder, prevent_repacking) < 0.02


def test_plain_bitsandbytes_and_peft_lose_the_scales(llama_folder):
    with pytest.raises(AttributeError, match="dtype"):
        dora_after_a_pass(llama_folder, lambda model: None)
