"""An export in few bits (GPTQ): what it is refused for, and where its library is, that it answers well and learns."""

import json
import random
from pathlib import Path

import pytest
import torch

import luthier
from luthier.config.load import load_export, load_infer
from luthier.core.errors import ConfigError, DataError, MissingExtra, ModelError
from luthier.core.manifest import read_manifest, verify_folder
from luthier.core.versions import is_installed
from luthier.model.backends import load_for_inference
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.quantization._gptq import group_size_for
from luthier.workflow import export
from luthier.workflow.preflight import requirements
from tests.model.adapters.test_lora import build
from tests.small_world import losses, small_world
from tests.tiny import tiny_llama

HAS_LIBRARY = is_installed("gptqmodel") and is_installed("optimum")
BASE = {"model_name_or_path": "m", "export_dir": "o", "template": "chatml"}
GPTQ = {"export_quantization_bit": 4, "export_quantization_dataset": "texts.jsonl"}


@pytest.fixture
def texts(tmp_path):
    chance, words = random.Random(0), ["alpha", "beta", "the", "of", "rain", "sun"]
    rows = [{"text": " ".join(chance.choices(words, k=60))} for _ in range(20)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({**GPTQ, "export_quantization_bit": 5}, "layouts for 2, 3, 4 and 8 bits"),
        ({"export_quantization_bit": 4}, "no texts are named -> give export_quantization_dataset"),
        ({**GPTQ, "adapter_name_or_path": "a"}, "export the merged model first, then quantize its folder"),
        ({**GPTQ, "export_gguf": "f16"}, "written from full-precision weights"),
        ({**GPTQ, "export_quantization_nsamples": 0}, "export_quantization_nsamples: 0: must be at least 1"),
        ({**GPTQ, "export_quantization_maxlen": 0}, "export_quantization_maxlen: 0: must be at least 1"),
    ],
)
def test_rules(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_export({**BASE, **keys})


def test_keys_that_nothing_reads_are_told():
    run = load_export({**BASE, "export_quantization_dataset": "d", "export_quantization_maxlen": 7})
    assert [warning.key for warning in run.warnings] == ["export_quantization_dataset", "export_quantization_maxlen"]
    assert not load_export({**BASE, **GPTQ}).warnings


def test_a_library_that_is_missing_is_one_problem(llama_folder, tmp_path, texts, monkeypatch):
    from luthier.config.load import read_source
    from luthier.workflow.preflight import load_checked

    keys = {**BASE, **GPTQ, "model_name_or_path": str(llama_folder), "export_dir": str(tmp_path / "out")}
    monkeypatch.setattr(requirements, "is_installed", lambda name: False)
    monkeypatch.setattr(export, "is_installed", lambda name: False)
    with pytest.raises(ConfigError) as caught:
        load_checked("export", read_source(keys), begins=True)
    (problem,) = caught.value.problems
    assert problem.key == "export_quantization_bit" and problem.remedy == "pip install 'luthier[gptq]'"
    with pytest.raises(MissingExtra, match=r"`gptqmodel`, which is not installed: pip install 'luthier\[gptq\]'"):
        luthier.export(keys)


def test_texts_and_weights_that_do_not_do_are_told_before_the_model_is_loaded(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(export, "is_installed", lambda name: True)
    base = tiny_llama(tmp_path / "base")
    keys = {**BASE, **GPTQ, "model_name_or_path": str(base), "export_dir": str(tmp_path / "out")}
    with pytest.raises(DataError, match=r"has 1,024 tokens; the longest has \d+ -> set export_quantization_maxlen"):
        luthier.export({**keys, "export_quantization_dataset": texts})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantized already \(GPTQ\) -> give the model that it was quantized from"):
        luthier.export({**keys, "export_quantization_dataset": texts})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("width", "group_size"), [(128, 128), (192, 64), (96, 32)])
def test_groups_divide_the_width_of_every_layer(tmp_path, width, group_size):
    folder = tiny_llama(tmp_path, hidden_size=width, intermediate_size=256, num_attention_heads=2)
    assert group_size_for(load_model(ModelSource(str(folder)), dtype=torch.float32)) == group_size


def test_a_width_that_no_group_divides_is_refused(tmp_path):
    folder = tiny_llama(tmp_path, hidden_size=72, num_attention_heads=2)
    with pytest.raises(ModelError, match="layers of this model are 72, 128 wide, which are no multiples of 32"):
        group_size_for(load_model(ModelSource(str(folder)), dtype=torch.float32))


def unpacked(tensors, name):
    """(out, in) integers and scales of a layer: eight numbers of 4 bits of an output lie in one int32."""
    shifts = 4 * torch.arange(8)
    rows = (tensors[f"{name}.qweight"].long()[:, None] >> shifts[:, None]) & 15
    groups = tensors[f"{name}.g_idx"].long()
    return rows.flatten(0, 1).T - 8, tensors[f"{name}.scales"].float()[groups].T


@pytest.mark.skipif(not HAS_LIBRARY, reason="the libraries gptqmodel and optimum, which quantize, are not installed")
def test_the_export_answers_as_the_original_and_learns(tmp_path, texts, said):
    """In each layer || W X - W' X || is smaller than for weights rounded to the nearest, with the same scales."""
    from safetensors.torch import load_file

    world = small_world(tmp_path / "world")
    base = tiny_llama(tmp_path / "base", hidden_size=128, intermediate_size=256)
    keys = {"model_name_or_path": str(base), "template": "chatml", "export_dir": str(tmp_path / "out"), **GPTQ}
    keys |= {"export_quantization_dataset": texts, "export_quantization_nsamples": 32}
    folder = luthier.export({**keys, "export_quantization_maxlen": 64})
    assert verify_folder(folder) == [] and read_manifest(folder)["gptq_bits"] == 4
    assert not (folder / "unquantized").exists() and not (tmp_path / "logs").exists()
    found = json.loads((folder / "merge_check.json").read_text())
    assert 0 < found["mean_kl"] < 0.01 and found["allowed_mean_kl"] is None
    assert any(line.startswith("GPTQ: 4 bits, measured on 32 pieces of 64 tokens") for line in said)

    original = load_for_inference(load_infer({"model_name_or_path": str(base), "infer_dtype": "float32"}))
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], original.lm_head.weight)
    name = "model.layers.0.self_attn.q_proj"
    inputs = []
    layer = original.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with torch.no_grad():
        original(input_ids=torch.tensor([calibration_ids(texts, base)]))
    hook.remove()
    integers, scales = unpacked(tensors, name)
    weight, x = layer.weight.detach(), inputs[0].T
    nearest = (weight / scales).round().clamp(-8, 7) * scales
    error, of_nearest = ((weight - w) @ x for w in (integers * scales, nearest))
    assert error.norm() < 0.95 * of_nearest.norm()

    run = {**world, "model_name_or_path": str(folder), "output_dir": str(tmp_path / "lora")}
    learned = losses(luthier.train({**run, "finetuning_type": "lora", "learning_rate": 1e-2, "max_steps": 3}))
    assert learned[-1] < learned[0] - 0.05
    beside = {"model_name_or_path": str(folder), "adapter_name_or_path": str(tmp_path / "lora")}
    assert isinstance(luthier.chat({**beside, "template": "chatml", "max_new_tokens": 4}).ask("Hello"), str)


def calibration_ids(texts, base):
    from transformers import AutoTokenizer

    rows = [json.loads(line)["text"] for line in Path(texts).read_text("utf-8").splitlines()]
    return AutoTokenizer.from_pretrained(base)(" ".join(rows)).input_ids[:120]


@pytest.mark.parametrize(("width", "expected"), [(128, 64), (32, 32)])
def test_experts_count_for_the_size_of_a_group(width, expected):
    """The layers are 64 wide, and the experts of the mixture 64 and `width`."""
    assert group_size_for(build("qwen3_moe", moe_intermediate_size=width)) == expected
