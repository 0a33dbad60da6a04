"""Checkpoints that were quantized before they were saved: recognized, loaded, trained beside, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier.config.load import load_infer, read_source
from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.model.backends import load_for_inference
from luthier.model.quantization import _prequantized
from luthier.model.quantization._layers import quantized_layers
from luthier.model.quantization._prequantized import prequantized_format_in, prequantized_format_of
from luthier.workflow.preflight import load_checked
from tests.small_world import losses, small_world

IDS = torch.arange(1, 40)[None]


@pytest.fixture
def world(tmp_path) -> dict[str, Any]:
    keys = small_world(tmp_path / "world")
    return {**keys, "finetuning_type": "lora", "learning_rate": 1e-2, "max_steps": 3, "output_dir": str(tmp_path / "o")}


def rewrite(folder: str, settings: dict[str, Any], change) -> dict[str, torch.Tensor]:
    """Pack every linear layer of a saved model but the head: `change(weight)` -> (tensors to save, weight they mean).

    Returns the weights that the packed ones mean.
    """
    path = Path(folder) / "model.safetensors"
    tensors, meant = {}, {}
    for name, weight in load_file(path).items():
        if name.endswith("_proj.weight"):
            parts, meant[name] = change(weight)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[name] = weight
    save_file(tensors, path, metadata={"format": "pt"})
    mark(folder, settings)
    return meant


def mark(folder: str, settings: dict[str, Any]) -> None:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"quantization_config": settings}
    path.write_text(json.dumps(config), encoding="utf-8")


def pack_fp8(weight: torch.Tensor, block: int = 32):
    """Blocks of 32 x 32 with one scale each: w = q s."""
    rows, columns = weight.shape[0] // block, weight.shape[1] // block
    blocks = weight.reshape(rows, block, columns, block)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    q = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
    meant = (q.float().reshape(blocks.shape) * scale).reshape(weight.shape)
    return {"weight": q, "weight_scale_inv": scale.reshape(rows, columns)}, meant


def pack_gptq(weight: torch.Tensor, group: int = 32):
    """4 bits, symmetric, 32 inputs share a scale: w = (q - 8) s. Eight numbers of an output lie in one int32.

    The zero point is saved less one, as the first version of the format has it.
    """
    num_out, num_in = weight.shape
    groups = weight.reshape(num_out, num_in // group, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    q = (groups / scale).round().clamp(-8, 7) + 8
    meant = ((q - 8) * scale).reshape(weight.shape)
    numbers = q.reshape(num_out, num_in).T.long()  # (in, out)
    shifts = 4 * torch.arange(8)
    packed_rows = (numbers.reshape(num_in // 8, 8, num_out) << shifts[:, None]).sum(1)
    zeros = torch.full((num_in // group, num_out // 8), 0x77777777)
    return {
        "qweight": packed_rows.to(torch.uint32).view(torch.int32),
        "qzeros": zeros.to(torch.int32),
        "scales": scale[..., 0].T.half().contiguous(),
        "g_idx": (torch.arange(num_in) // group).to(torch.int32),
    }, meant


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in which four bits, from the lowest up."""


def pack_awq(weight: torch.Tensor, group: int = 32):
    """4 bits, 32 inputs share a scale and a zero point: w = (q - z) s. Eight outputs of an input lie in one int32."""
    num_out, num_in = weight.shape
    groups = weight.reshape(num_out, num_in // group, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    q = (groups / scale + zero).round().clamp(0, 15)
    meant = ((q - zero) * scale).reshape(weight.shape)

    def packed_columns(numbers: torch.Tensor) -> torch.Tensor:
        eights = numbers.long().reshape(len(numbers), num_out // 8, 8)[..., AWQ_ORDER]
        return (eights << 4 * torch.arange(8)).sum(-1).to(torch.uint32).view(torch.int32)

    return {
        "qweight": packed_columns(q.reshape(num_out, num_in).T),
        "qzeros": packed_columns(zero[..., 0].T),
        "scales": scale[..., 0].T.half().contiguous(),
    }, meant


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@torch.no_grad()
def logits_of(model):
    return model(IDS.to(model.device)).logits


def meant_logits(folder, meant):
    """Of a plain model with the weights that the packed ones mean."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain = load_file(Path(folder) / "model.safetensors")
    model.load_state_dict({name: value for name, value in {**plain, **meant}.items() if name in model.state_dict()})
    return logits_of(model)


def infer(folder, **keys):
    return load_for_inference(load_infer({"model_name_or_path": str(folder), **keys}))


def test_fp8_is_unpacked_and_then_a_model_like_any_other(world, tmp_path, said):
    folder = world["model_name_or_path"]
    meant = rewrite(folder, FP8, pack_fp8)
    model = infer(folder, quantization_bit=4)
    assert torch.allclose(logits_of(model), meant_logits(folder, meant), atol=1e-4)
    assert not list(quantized_layers(model)) and not hasattr(model.config, "quantization_config")
    assert any("quantized weights (FP8) are unpacked while they are read" in line for line in said)
    assert any("its weights are quantized already (FP8), so it is not read" in line for line in said)
    for finetuning_type in ("lora", "full"):
        found = losses(luthier.train({**world, "finetuning_type": finetuning_type, "learning_rate": 1e-3}))
        assert found[-1] < found[0]
    luthier.train(world)
    keys = {"model_name_or_path": folder, "adapter_name_or_path": world["output_dir"], "template": "chatml"}
    merged = luthier.export({**keys, "export_dir": str(tmp_path / "merged")})
    assert prequantized_format_in(Path(merged)) is None
    together = infer(folder, adapter_name_or_path=world["output_dir"])
    assert torch.allclose(logits_of(infer(merged, infer_dtype="float32")), logits_of(together), atol=1e-4)


def pack_compressed(weight: torch.Tensor, group: int = 32):
    """4 bits, symmetric, 32 inputs share a scale: w = (q - 8) s. Eight inputs of an output lie in one int32."""
    num_out, num_in = weight.shape
    groups = weight.reshape(num_out, num_in // group, group)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    q = (groups / scale).round().clamp(-8, 7)
    packed_rows = ((q + 8).long().reshape(num_out, num_in // 8, 8) << 4 * torch.arange(8)).sum(-1)
    return {
        "weight_packed": packed_rows.to(torch.uint32).view(torch.int32),
        "weight_scale": scale[..., 0].contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }, (q * scale).reshape(weight.shape)


def test_compressed_tensors_are_unpacked_wherever_an_adapter_or_learning_needs_it(world, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the library compressed-tensors is not installed")
    folder = world["model_name_or_path"]
    bits = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": bits}},
    }
    expected = meant_logits(folder, rewrite(folder, settings, pack_compressed))
    assert torch.allclose(logits_of(infer(folder)), expected, atol=1e-5)
    for finetuning_type, rate in (("full", 1e-3), ("lora", 1e-2)):
        keys = {"finetuning_type": finetuning_type, "learning_rate": rate, "overwrite_output_dir": True}
        found = losses(luthier.train({**world, **keys}))
        assert found[-1] < found[0] - 0.05
    keys = {"model_name_or_path": folder, "adapter_name_or_path": world["output_dir"], "template": "chatml"}
    merged = luthier.export({**keys, "export_dir": str(tmp_path / "merged")})
    together = logits_of(infer(folder, adapter_name_or_path=world["output_dir"]))
    assert (together - expected).norm() > 0.05 * expected.norm()
    assert torch.allclose(logits_of(infer(merged, infer_dtype="float32")), together, atol=1e-4)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""What three bits mean in MXFP4; the fourth is the sign."""


def pack_mxfp4(weight: torch.Tensor):
    """(experts, in, out) -> two numbers in a byte, the first in the lower half, and 2^(scale - 127) for 32 inputs."""
    rows = weight.mT
    groups = rows.reshape(*rows.shape[:-1], -1, 32)
    exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    nearest = (groups[..., None].abs() / 2 ** exponent[..., None] - FP4).abs().argmin(-1)
    meant = FP4[nearest] * groups.sign() * 2**exponent
    q = nearest + 8 * (groups < 0)
    blocks = (q[..., 0::2] + 16 * q[..., 1::2]).to(torch.uint8)
    return blocks, (exponent[..., 0] + 127).to(torch.uint8), meant.reshape(rows.shape).mT.contiguous()


def test_mxfp4_experts_are_unpacked_and_then_a_model_like_any_other(world, tmp_path, said):
    from transformers import GptOssConfig

    from tests.tiny import TINY_LLAMA, save_tiny

    shape = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = str(save_tiny(tmp_path / "gpt_oss", GptOssConfig(**{**TINY_LLAMA, **shape})))
    path = Path(folder) / "model.safetensors"
    tensors, meant = {}, {}
    for name, weight in load_file(path).items():
        if "experts" in name and name.endswith("_proj"):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], meant[name] = pack_mxfp4(weight)
            assert (meant[name] - weight).norm() < 0.2 * weight.norm()
        else:
            tensors[name] = weight
    assert len(meant) == 4
    save_file(tensors, path, metadata={"format": "pt"})
    mark(folder, {"quant_method": "mxfp4"})
    expected = meant_logits(folder, meant)
    assert torch.allclose(logits_of(infer(folder, infer_dtype="float32")), expected, atol=1e-4)
    assert any("quantized weights (MXFP4) are unpacked while they are read" in line for line in said)
    run = {**world, "model_name_or_path": folder}
    found = losses(luthier.train(run))
    assert found[-1] < found[0] - 0.05
    keys = {"model_name_or_path": folder, "adapter_name_or_path": world["output_dir"], "template": "chatml"}
    merged = luthier.export({**keys, "export_dir": str(tmp_path / "merged"), "infer_dtype": "float32"})
    assert prequantized_format_in(Path(merged)) is None
    together = logits_of(infer(folder, adapter_name_or_path=world["output_dir"], infer_dtype="float32"))
    assert torch.allclose(logits_of(infer(merged, infer_dtype="float32")), together, atol=1e-4)


def test_a_bitsandbytes_checkpoint_is_trained_beside(world, tmp_path, said):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoTokenizer

    original = world["model_name_or_path"]
    model = infer(original, quantization_bit=4)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "bnb")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "bnb")
    assert prequantized_format_in(tmp_path / "bnb")[0] == "bitsandbytes"
    assert torch.equal(logits_of(infer(tmp_path / "bnb")), expected)
    keys = {**world, "model_name_or_path": str(tmp_path / "bnb")}
    found = losses(luthier.train({**keys, "quantization_bit": 4}))
    assert found[-1] < found[0] - 0.05
    assert any("quantization_bit: " in line and "quantized already (bitsandbytes)" in line for line in said)
    adapter = {"adapter_name_or_path": world["output_dir"]}
    assert (logits_of(infer(tmp_path / "bnb", **adapter)) - expected).abs().max() > 1e-3
    export = {"model_name_or_path": str(tmp_path / "bnb"), "template": "chatml", **adapter}
    with pytest.raises(ModelError, match="cannot be merged into them -> give the model that it was quantized from"):
        luthier.export({**export, "export_dir": str(tmp_path / "merged")})


@pytest.mark.parametrize(
    ("settings", "pack", "libraries"),
    [(GPTQ, pack_gptq, ("gptqmodel", "optimum")), (AWQ, pack_awq, ("gptqmodel",))],
    ids=["gptq", "awq"],
)
def test_what_gptqmodel_reads_is_loaded_and_trained_beside(world, settings, pack, libraries):
    for library in libraries:
        pytest.importorskip(library, reason=f"the library {library}, which reads this, is not installed")
    folder = world["model_name_or_path"]
    meant = rewrite(folder, settings, pack)
    model = infer(folder)
    assert len(list(quantized_layers(model))) == 14
    expected = meant_logits(folder, meant)
    assert (logits_of(model) - expected).norm() < 0.02 * expected.norm()
    found = losses(luthier.train(world))
    assert found[-1] < found[0] - 0.05
    weights = load_file(Path(world["output_dir"]) / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name), "some layers got no gradient"
    beside = infer(folder, adapter_name_or_path=world["output_dir"])
    assert (logits_of(beside) - expected).norm() > 0.05 * expected.norm()
    with pytest.raises(ModelError, match="cannot be merged into them -> give the model that it was quantized from"):
        keys = {"model_name_or_path": folder, "adapter_name_or_path": world["output_dir"], "template": "chatml"}
        luthier.export({**keys, "export_dir": f"{world['output_dir']}_merged"})


def pack_aqlm(weight: torch.Tensor, num_vectors: int = 256, num_codebooks: int = 2, group: int = 8):
    """Eight inputs of an output are a sum of vectors, one of each codebook, times the scale of the output.

    A codebook are vectors of what is left over by those before it. Codes are saved as signed numbers.
    """
    num_out, num_in = weight.shape
    scale = weight.square().mean(1, keepdim=True).sqrt()
    left = (weight / scale).reshape(-1, group)
    codebooks, codes = [], []
    for _ in range(num_codebooks):
        codebook = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(0))[:num_vectors]]
        codebook = torch.cat((codebook, torch.zeros(num_vectors - len(codebook), group)))
        codes.append(torch.cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
        codebooks.append(codebook)
    meant = scale * ((weight / scale).reshape(-1, group) - left).reshape(weight.shape)
    signed = torch.int8 if num_vectors == 256 else torch.int16
    stored = torch.stack(codes, -1).to(torch.uint16).view(torch.int16)
    return {
        "codes": stored.to(signed).reshape(num_out, num_in // group, num_codebooks),
        "codebooks": torch.stack(codebooks)[:, :, None].contiguous(),
        "scales": scale[..., None, None].contiguous(),
    }, meant


@pytest.mark.parametrize(("num_vectors", "num_codebooks"), [(256, 2), (65536, 1)])
def test_an_aqlm_checkpoint_is_loaded_and_trained_beside(world, capfd, num_vectors, num_codebooks):
    pytest.importorskip("aqlm", reason="the library aqlm, which reads AQLM, is not installed")
    folder = world["model_name_or_path"]
    names = [name for name in load_file(Path(folder) / "model.safetensors") if not name.endswith("_proj.weight")]
    settings = {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": num_codebooks,
        "nbits_per_codebook": num_vectors.bit_length() - 1,
        "linear_weights_not_to_quantize": names,
    }
    meant = rewrite(folder, settings, lambda weight: pack_aqlm(weight, num_vectors, num_codebooks))
    capfd.readouterr()
    model = infer(folder)
    assert "[transformers]" not in capfd.readouterr().err, "how weights are split up between devices says nothing here"
    assert len(list(quantized_layers(model))) == 14
    expected = meant_logits(folder, meant)
    assert torch.allclose(logits_of(model), expected, atol=1e-4)
    found = losses(luthier.train(world))
    assert found[-1] < found[0] - 0.05
    weights = load_file(Path(world["output_dir"]) / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name), "some layers got no gradient"
    beside = infer(folder, adapter_name_or_path=world["output_dir"])
    assert (logits_of(beside) - expected).norm() > 0.05 * expected.norm()


METHODS = [
    ("gptq", "gptqmodel", "pip install 'luthier[gptq]'"),
    ("awq", "gptqmodel", "pip install 'luthier[gptq]'"),
    ("aqlm", "aqlm", "pip install 'aqlm[gpu,cpu]'"),
    ("bitsandbytes", "bitsandbytes", "pip install 'luthier[bnb]'"),
    ("hqq", "hqq", "pip install 'luthier[hqq]'"),
    ("compressed-tensors", "compressed_tensors", "pip install 'luthier[compressed]'"),
]


@pytest.mark.parametrize(("method", "library", "install"), METHODS)
def test_a_library_that_is_missing_is_named_before_weights_are_read(world, monkeypatch, method, library, install):
    mark(world["model_name_or_path"], {"quant_method": method, "bits": 4})
    monkeypatch.setattr(_prequantized, "is_installed", lambda name: False)
    with pytest.raises(ConfigError) as caught:
        load_checked("train", read_source(world), begins=True)
    (problem,) = caught.value.problems
    assert problem.key == "model_name_or_path" and problem.remedy == install
    assert f"needs the library {library}, and that is not installed" in problem.reason
    with pytest.raises(MissingExtra, match=library):
        infer(world["model_name_or_path"])


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"finetuning_type": "full"}, "finetuning_type"),
        ({"finetuning_type": "freeze"}, "finetuning_type"),
        ({"resize_vocab": True, "additional_target": "lm_head"}, "resize_vocab"),
        ({"add_tokens": "<a>"}, "add_tokens"),
        ({"loftq_init": True, "quantization_bit": 4}, "loftq_init"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"adapter_name_or_path": "ADAPTER", "create_new_adapter": True}, "create_new_adapter"),
        ({"adapter_name_or_path": "ADAPTER,ANOTHER"}, "adapter_name_or_path"),
    ],
)
def test_what_packed_weights_cannot_do_is_told_before_they_are_read(world, monkeypatch, keys, key):
    mark(world["model_name_or_path"], {"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(_prequantized, "is_installed", lambda name: True)
    with pytest.raises(ConfigError) as caught:
        load_checked("train", read_source({**world, **keys}), begins=True)
    (problem,) = caught.value.problems
    assert problem.key == key and "quantized (GPTQ)" in problem.reason and problem.remedy
    if key != "fsdp":  # which one process alone refuses for a reason of its own
        with pytest.raises(ModelError, match=r"quantized \(GPTQ\)"):
            luthier.train({**world, **keys})


def test_kinds_are_told_apart():
    assert prequantized_format_of({}) is None
    assert prequantized_format_of({"quantization_config": {"load_in_4bit": True}})[0] == "bitsandbytes"
    assert prequantized_format_of({"text_config": {"quantization_config": {"quant_method": "awq"}}})[0] == "awq"
    assert prequantized_format_of({"quantization_config": {"quant_method": "torchao"}})[1].words == "torchao"
    assert prequantized_format_of({"quantization_config": {"quant_method": "mxfp4"}})[1].unpacks
