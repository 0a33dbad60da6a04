"""Adapters on quantized models: trained as on the same weights dequantized, and usable afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.cli import main
from luthier.config.load import load_infer, load_train
from luthier.model.backends import load_for_inference
from luthier.model.quantization._layers import quantized_layers
from tests.matrix import representatives
from tests.small_world import losses, small_world

pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
METHODS = [("bnb", 4), ("bnb", 8), ("hqq", 4), ("hqq", 2)]
IDS = torch.arange(1, 60)[None]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    keys = small_world(tmp_path_factory.mktemp("world"))
    more = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "quantization_bit": 4, "max_steps": 4}
    return {**keys, **more, "learning_rate": 1e-3}


def quantized_model(world, method="bnb", bits=4, **keys):
    values = {name: world[name] for name in ("model_name_or_path", "template")}
    return load_for_inference(load_infer({**values, "quantization_bit": bits, "quantization_method": method, **keys}))


@torch.no_grad()
def logits_of(model):
    return model(IDS.to(model.device)).logits


def unpack(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if hasattr(layer, "W_q"):
        return layer.dequantize()
    if layer.weight.dtype == torch.int8:
        return int8_vectorwise_dequant(layer.weight, layer.weight.SCB)
    return dequantize_4bit(layer.weight, layer.weight.quant_state)


@pytest.mark.parametrize(("method", "bits"), representatives(METHODS, ("bnb", 4), ("hqq", 4)))
def test_losses_equal_those_of_lora_on_dequantized_weights(world, tmp_path, method, bits):
    """8 bits multiply in whole numbers, so their gradients are near those of the unpacked weights, not equal."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(world["model_name_or_path"], dtype=torch.float32)
    for name, layer in quantized_layers(quantized_model(world, method, bits)):
        plain.get_submodule(name).weight.data = unpack(layer).float()
    plain.save_pretrained(tmp_path / "plain")
    luthier_files = Path(world["model_name_or_path"])
    for file in luthier_files.glob("tokenizer*"):
        (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    keys = {**world, "quantization_method": method, "quantization_bit": bits}
    found = losses(luthier.train({**keys, "output_dir": str(tmp_path / "quantized")}))
    del keys["quantization_bit"], keys["quantization_method"]
    keys |= {"model_name_or_path": str(tmp_path / "plain"), "output_dir": str(tmp_path / "out")}
    expected = losses(luthier.train(keys))
    assert found == pytest.approx(expected, abs=5e-3 if (method, bits) == ("bnb", 8) else 2e-4)
    assert expected[0] - expected[-1] > 0.01


LEARNS: list[dict[str, Any]] = [
    {"bf16": True, "upcast_layernorm": True},
    {"pure_bf16": True, "quantization_method": "hqq"},
    {"use_dora": True, "quantization_bit": 8},
    {"use_dora": True},
    {"use_reentrant_gc": False, "lora_target": "all"},
    {"quantization_method": "hqq", "lora_target": "all", "quantization_bit": 3},
    {"finetuning_type": "oft", "oft_target": "all"},
    {"stage": "pt", "dataset": "plain", "upcast_lmhead_output": True},
]


@pytest.mark.parametrize("keys", representatives(LEARNS, *LEARNS[:2], LEARNS[-2]), ids=str)
def test_it_learns(world, tmp_path, keys):
    values = {**world, "learning_rate": 1e-2, "output_dir": str(tmp_path / "out"), **keys}
    if "oft_target" in keys:
        del values["lora_target"]
    found = losses(luthier.train(values))
    assert found[-1] < found[0] - 0.01


def test_an_evaluation_between_two_steps_changes_no_loss(world, tmp_path):
    without = losses(luthier.train({**world, "output_dir": str(tmp_path / "a")}))
    evaluated = {**world, "eval_dataset": "numbers", "eval_strategy": "steps", "eval_steps": 1}
    assert losses(luthier.train({**evaluated, "output_dir": str(tmp_path / "b")})) == without


def test_four_and_four_steps_are_eight(world, tmp_path):
    eight = {**world, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    whole = luthier.train({**eight, "output_dir": str(tmp_path / "whole")})
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = {**eight, "output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": checkpoint}
    assert losses(luthier.train(resumed))[-4:] == losses(whole)[-4:]


EXAMPLE = """\
model_name_or_path: {model}
finetuning_type: lora
lora_target: q_proj,v_proj
quantization_bit: 4
flash_attn: {attention}
cutoff_len: 1024
output_dir: ./output_qlora_model
"""


@pytest.fixture(scope="module")
def example(world, tmp_path_factory):
    """The run file of a reference user, with a dataset added, trained by the command."""
    folder = tmp_path_factory.mktemp("example")
    path = folder / "qlora_config.yaml"
    text = EXAMPLE.format(model=world["model_name_or_path"], attention="fa2")
    text += f"dataset: numbers\ndataset_dir: {world['dataset_dir']}\ntemplate: chatml\n"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", str(path), "max_steps=3", "learning_rate=1e-2"]) in (0, None)
    return folder


def test_only_the_two_named_projections_are_trained(example, world):
    """2 layers, rank 8: q is 64 -> 64, v is 64 -> 32."""
    weights = load_file(example / "output_qlora_model" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "v_proj"}
    assert sum(weight.numel() for weight in weights.values()) == 2 * 8 * ((64 + 64) + (64 + 32))


def test_the_trainable_share_is_that_of_the_whole_model(world, tmp_path, said):
    luthier.train({**world, "max_steps": 1, "output_dir": str(tmp_path / "out")})
    from transformers import AutoModelForCausalLM

    total = 3584 + AutoModelForCausalLM.from_pretrained(world["model_name_or_path"]).num_parameters()
    assert f"trainable parameters: 3,584 of {total:,} ({3584 / total:.4%})" in said


@pytest.mark.parametrize("attention", ["fa2", "fa3"])
def test_unavailable_attention_is_replaced_and_reported_once(world, tmp_path, said, attention):
    luthier.train({**world, "max_steps": 1, "flash_attn": attention, "output_dir": str(tmp_path / "out")})
    lines = [line for line in said if "FlashAttention" in line]
    assert len(lines) == 1 and lines[0].startswith(f"flash_attn: {attention}: ")
    assert f"FlashAttention-{attention[-1]}" in lines[0] and lines[0].endswith(": sdpa attention runs instead")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert "sdpa" in manifest["computed_with"]["attention"] or "luthier" in manifest["computed_with"]["attention"]


def test_chat_attaches_the_adapter_to_the_quantized_weights(example, world, said, capsys, monkeypatch):
    monkeypatch.chdir(example)
    keys = [f"model_name_or_path={world['model_name_or_path']}", "adapter_name_or_path=output_qlora_model"]
    keys += ["quantization_bit=4", "template=chatml", "max_new_tokens=4", "finetuning_type=lora"]
    assert main(["chat", *keys, "--once", "hi"]) in (0, None)
    assert "adapter output_qlora_model attached to the quantized weights" in said
    assert capsys.readouterr().out


def test_the_logits_of_the_adapter_are_those_of_plain_peft(example, world):
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    adapter = str(example / "output_qlora_model")
    base = AutoModelForCausalLM.from_pretrained(
        world["model_name_or_path"], quantization_config=bits, dtype=torch.float32
    )
    # In evaluation mode bitsandbytes would compute in bfloat16.
    expected = logits_of(peft.PeftModel.from_pretrained(base, adapter).train())
    found = logits_of(quantized_model(world, adapter_name_or_path=adapter))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits_of(quantized_model(world)), atol=1e-3)


def test_an_export_merges_into_the_original_weights(example, world, tmp_path):
    """W + (alpha / r) B A with the W of the checkpoint, not of its quantized copy."""
    keys = {"model_name_or_path": world["model_name_or_path"], "template": "chatml", "quantization_bit": 4}
    folder = luthier.export(
        {**keys, "adapter_name_or_path": str(example / "output_qlora_model"), "export_dir": str(tmp_path / "merged")}
    )
    merged = load_file(Path(folder) / "model.safetensors")
    original = load_file(Path(world["model_name_or_path"]) / "model.safetensors")
    adapter = load_file(example / "output_qlora_model" / "adapter_model.safetensors")
    for name, weight in original.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.weight" in adapter:
            weight = weight + 2 * adapter[f"{place}.lora_B.weight"] @ adapter[f"{place}.lora_A.weight"]
        assert torch.allclose(merged[name], weight, atol=1e-6), name


def test_an_adapter_is_trained_further_on_the_quantized_model(example, world, tmp_path):
    adapter = str(example / "output_qlora_model")
    keys = {**world, "adapter_name_or_path": adapter, "max_steps": 2, "output_dir": str(tmp_path / "more")}
    first = losses(luthier.train({**keys, "learning_rate": 1e-2}))
    start = losses(luthier.train({**world, "max_steps": 1, "output_dir": str(tmp_path / "fresh")}))
    assert first[0] < start[0] - 0.01
    load_train(keys)
