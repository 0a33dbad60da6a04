"""Linear layers of few bits: what they weigh, what they compute, and what is told of them."""

import dataclasses

import pytest
import torch

from luthier.config.keys.quantization import QuantizationConfig
from luthier.config.load import load_infer
from luthier.core.errors import MissingExtra, ModelError
from luthier.core.machine import detect
from luthier.model.backends import load_for_inference
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.loading.parameters import count_parameters
from luthier.model.quantization import _layers
from luthier.model.quantization._layers import num_layer_bytes, num_weights, plan, quantized_layers
from tests.tiny import save_tiny, tiny_llama

pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
IDS = torch.arange(1, 40)[None]
METHODS = [("bnb", 4), ("bnb", 8), *(("hqq", bits) for bits in (1, 2, 3, 4, 5, 6, 8))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), hidden_size=128, intermediate_size=256)


def quantized(folder, method="bnb", bits=4, **keys):
    values = {"model_name_or_path": str(folder), "quantization_method": method, "quantization_bit": bits, **keys}
    return load_for_inference(load_infer(values))


@torch.no_grad()
def logits_of(model):
    return model(IDS.to(model.device)).logits.float()


@pytest.fixture(scope="module")
def original(folder):
    return load_for_inference(load_infer({"model_name_or_path": str(folder)}))


@pytest.mark.parametrize(("method", "bits"), METHODS)
def test_every_linear_layer_but_the_head_is_quantized(folder, original, method, bits):
    """The error halves with every bit, roughly; embeddings, norms and head are those of the original, bit for bit."""
    model = quantized(folder, method, bits)
    linear = {name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert {name for name, _ in quantized_layers(model)} == linear
    assert type(model.lm_head) is torch.nn.Linear
    for name in ("model.embed_tokens", "model.layers.0.input_layernorm", "model.norm", "lm_head"):
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
    expected = logits_of(original)
    error = (logits_of(model) - expected).norm() / expected.norm()
    assert 0 < error < 4 * 2**-bits
    assert count_parameters(model)[1] == count_parameters(original)[1]


@pytest.mark.parametrize("quantization_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_4_bits_of_bitsandbytes_by_hand(folder, original, quantization_type, double):
    """w = absmax of its block of 64 x the nearest of 16 values; scales of 8 bits change it by a few per mille."""
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type

    keys = {"quantization_type": quantization_type, "double_quantization": double}
    layer = quantized(folder, **keys).model.layers[0].mlp.up_proj
    weight = original.model.layers[0].mlp.up_proj.weight.detach()
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    code = get_4bit_type(quantization_type, device="cpu")
    nearest = code[(blocks[..., None] / scale[..., None] - code).abs().argmin(-1)] * scale
    found = dequantize_4bit(layer.weight, layer.weight.quant_state).cpu()
    error = (found - nearest.reshape(weight.shape)).abs().max() / weight.abs().max()
    assert error < (2e-2 if double else 1e-6)
    assert layer.weight.quant_state.nested == double


def test_what_the_layers_weigh(tmp_path):
    """nf4 with double quantization at a realistic width: 4 bits, and 8 bits of scale for every 64 weights."""
    wide = tiny_llama(tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    layers = [layer for _, layer in quantized_layers(quantized(wide))]
    weights = sum(map(num_weights, layers))
    assert 0.5 * weights < sum(map(num_layer_bytes, layers)) < 0.35 * 2 * weights
    eight = [layer for _, layer in quantized_layers(quantized(wide, bits=8))]
    assert weights < sum(map(num_layer_bytes, eight)) < 1.02 * weights


@pytest.mark.parametrize(("method", "bits"), [("bnb", 4), ("bnb", 8)])
def test_while_reading_and_in_memory_give_the_same_model(folder, method, bits, monkeypatch):
    read = quantized(folder, method, bits, infer_dtype="float32")
    monkeypatch.setattr(_layers.Quantization, "_while_reading", lambda self, is_gguf: False)
    in_memory = quantized(folder, method, bits, infer_dtype="float32")
    assert torch.equal(logits_of(read), logits_of(in_memory))
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        assert getattr(read, name, None) == getattr(in_memory, name, None)
    assert read.config.quantization_config.to_dict() == in_memory.config.quantization_config.to_dict()


@pytest.mark.parametrize(("method", "bits"), [("bnb", 4), ("hqq", 4)])
def test_transposed_layers_and_16_bits(tmp_path, method, bits):
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    folder = save_tiny(tmp_path, config)
    expected = logits_of(load_for_inference(load_infer({"model_name_or_path": str(folder)})))
    model = quantized(folder, method, bits, infer_dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and len(list(quantized_layers(model))) == 4
    assert (logits_of(model) - expected).norm() < 0.2 * expected.norm()


def test_shapes_that_hqq_cannot_take_are_left_and_told(tmp_path, said):
    folder = tiny_llama(tmp_path, hidden_size=20, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1)
    model = quantized(folder, "hqq", 4)
    assert {name.split(".")[-2] for name, _ in quantized_layers(model)} == {"mlp"}
    assert any("4 layers such as model.layers.0.self_attn.q_proj have shapes that" in line for line in said)


def test_what_was_done_is_said(folder, said):
    quantized(folder)
    assert any("14 linear layers quantized to 4 bits (bnb): 0." in line and "in bfloat16" in line for line in said)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(_layers, "is_installed", lambda name: name != "hqq")
    keys = QuantizationConfig(quantization_bit=4, quantization_method="hqq")
    with pytest.raises(MissingExtra, match=r"hqq.*not installed -> pip install 'luthier\[hqq\]'"):
        plan(keys, detect())


def test_eetq_needs_a_gpu(monkeypatch):
    from luthier.core.kinds import QUANTIZERS

    monkeypatch.setattr(_layers, "is_installed", lambda name: True)
    keys = QuantizationConfig(quantization_bit=8, quantization_method="eetq")
    cpu = dataclasses.replace(detect(), device="cpu", num_accelerators=0)
    with pytest.raises(ModelError, match=r"needs an NVIDIA GPU, and this machine has none -> .* bnb or hqq"):
        plan(keys, cpu)
    gpu = dataclasses.replace(cpu, device="cuda", num_accelerators=2, local_rank=1)
    options = plan(keys, gpu).options(torch.bfloat16, None, is_gguf=False)
    assert options["device_map"] == {"": "cuda:1"} and options["quantization_config"].quant_method == "eetq"
    with pytest.raises(ModelError, match="cannot quantize a GGUF file"):
        plan(keys, gpu).finish(torch.nn.Linear(1, 1), torch.bfloat16, is_gguf=True)
    assert QUANTIZERS.get("eetq").needs_gpu


def test_a_device_map_and_a_common_number_format_where_processes_share(folder):
    gpu = dataclasses.replace(detect(), device="cuda", num_accelerators=2, local_rank=0)
    keys = QuantizationConfig(quantization_bit=4, quantization_device_map="auto")
    assert plan(keys, gpu).options(torch.bfloat16, None, is_gguf=False)["device_map"] == "auto"
    shared = plan(QuantizationConfig(quantization_bit=4), gpu, sharded=True)
    config = shared.options(torch.bfloat16, None, is_gguf=False)["quantization_config"]
    assert config.bnb_4bit_quant_storage == torch.bfloat16 and config.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_model_that_is_not_to_be_quantized_is_not(folder):
    assert plan(QuantizationConfig(), detect()) is None
    assert not list(quantized_layers(load_model(ModelSource(str(folder)), dtype=torch.float32)))


def tiny_gguf(path):
    """A random Llama of one block in float16, with the names and keys of llama.cpp."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(320)
    shapes = {"token_embd": (320, 64), "output": (320, 64), "output_norm": (64,)}
    shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    shapes |= {"blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.1).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("method", "bits"), [("bnb", 4), ("bnb", 8), ("hqq", 4)])
def test_a_gguf_file_is_quantized_layer_by_layer(tmp_path, method, bits):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    expected = logits_of(load_for_inference(load_infer({"model_name_or_path": str(file)})))
    model = quantized(file, method, bits)
    assert len(list(quantized_layers(model))) == 7
    assert 0 < (logits_of(model) - expected).norm() < 4 * 2**-bits * expected.norm()
