"""LoftQ: the adapter starts as the best low-rank part of what quantization took away."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import luthier
from luthier.config.keys.quantization import LOFTQ_FILE, QuantizationConfig
from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError, ModelError
from luthier.core.kinds import ADAPTERS, QUANTIZERS
from luthier.core.manifest import verify_folder
from luthier.model.adapters._loftq import round_weights
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.lora import LoraConfig
from luthier.model.backends import load_for_inference
from luthier.model.quantization._layers import Quantization, computed_weight, describe, keys_in
from tests.model.adapters.test_merge import fresh
from tests.small_world import small_world
from tests.tiny import save_tiny, tiny_llama

pytest.importorskip("bitsandbytes")
BASE = {"model_name_or_path": "m", "dataset": "d", "template": "qwen", "output_dir": "o", "do_train": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def quantized(folder, **keys):
    return load_for_inference(load_infer({"model_name_or_path": str(folder), "quantization_bit": 4, **keys}))


@pytest.mark.parametrize("method", ["bnb", "hqq"])
def test_what_the_adapter_starts_from(folder, method):
    """W - Q - s B A is W - Q without its first r singular values."""
    pytest.importorskip(method if method == "hqq" else "bitsandbytes")
    model = quantized(folder, quantization_method=method)
    config = LoraConfig(loftq_init=True, lora_rank=8, lora_target=("q_proj", "down_proj"))
    adapted = ADAPTERS.get("lora").apply(
        model,
        config,
        given=GivenAdapters(),
        pure_bf16=False,
        original=lambda: fresh(folder),
    )
    original = fresh(folder)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = adapted.get_base_model().get_submodule(name)
        lost = original.get_submodule(name).weight - computed_weight(layer.base_layer).cpu()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        lost, a, b = lost.detach(), a.detach().cpu(), b.detach().cpu()
        left_over = lost - layer.scaling["default"] * b.float() @ a.float()
        expected = torch.linalg.svdvals(lost)[8:].norm()
        assert left_over.norm() == pytest.approx(float(expected), rel=0.03)
        assert left_over.norm() < 0.9 * lost.norm()


def test_what_a_quantized_layer_computes(folder):
    model, original = quantized(folder), fresh(folder)
    layer = model.model.layers[0].mlp.up_proj
    weight = original.model.layers[0].mlp.up_proj.weight.to(model.device)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        torch.testing.assert_close(x @ computed_weight(layer).T, layer(x).float(), atol=1e-3, rtol=1e-3)
    assert 0 < (computed_weight(layer) - weight).abs().max() < weight.abs().max()


def test_a_layer_of_hqq_is_computed_in_its_own_number_format(folder):
    """It takes no other, and gives in bfloat16 what it gives in float32 but for rounding."""
    pytest.importorskip("hqq")
    weights = {}
    for name in ("bfloat16", "float32"):
        model = quantized(folder, quantization_method="hqq", infer_dtype=name)
        weights[name] = computed_weight(model.model.layers[0].mlp.up_proj)
    assert weights["bfloat16"].dtype == torch.float32
    torch.testing.assert_close(weights["bfloat16"], weights["float32"], atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "nothing is quantized here"),
        ({"quantization_bit": 4, "use_dora": True}, "changes the direction"),
        ({"quantization_bit": 4, "pissa_init": True}, "quantized weights cannot give"),
    ],
)
def test_rules(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train({**BASE, "loftq_init": True, **keys})


# -- the adapter belongs to the quantized weights ------------------------------------------------


@pytest.fixture(scope="module", params=[("bnb", "float32"), ("hqq", "float32"), ("bnb", "bfloat16")], ids="-".join)
def trained(request, tmp_path_factory):
    """Keys of a base and an adapter of LoftQ on it, by two steps of training, and the keys that quantize."""
    method, dtype = request.param
    pytest.importorskip("hqq" if method == "hqq" else "bitsandbytes")
    world = small_world(tmp_path_factory.mktemp("world"))
    bits = {"quantization_bit": 4, "quantization_method": method}
    run = {**world, **bits, "finetuning_type": "lora", "loftq_init": True, "learning_rate": 1e-2, "max_steps": 2}
    folder = Path(world["output_dir"])
    luthier.train({**run, "bf16": dtype == "bfloat16", "upcast_layernorm": dtype == "bfloat16"})
    record = json.loads((folder / LOFTQ_FILE).read_text())
    assert record["quantization_bit"] == 4 and record["computed_in"] == dtype
    assert verify_folder(folder) == []
    model = {"model_name_or_path": world["model_name_or_path"], "template": "chatml"}
    return {**model, "infer_dtype": "float32", "adapter_name_or_path": str(folder)}, bits, world


@torch.no_grad()
def logits_of(keys):
    model = load_for_inference(load_infer(keys))
    return model(torch.arange(1, 40, device=model.device)[None]).logits.float()


def test_with_the_quantization_keys_it_is_merged_into_the_weights_as_quantized(trained, tmp_path, said):
    """Merged into the original weights it would be off by the error of quantization, which it makes good."""
    keys, bits, world = trained
    folder = luthier.export({**keys, **bits, "export_dir": str(tmp_path / "merged")})
    merged = logits_of({"model_name_or_path": str(folder), "infer_dtype": "float32"})
    computed_in = json.loads((Path(world["output_dir"]) / LOFTQ_FILE).read_text())["computed_in"]
    beside = logits_of({**keys, **bits, "infer_dtype": computed_in})
    tolerance = 1e-4 if computed_in == "float32" else 0.01
    assert (merged - beside).norm() < tolerance * beside.norm()
    assert any("belongs to quantized weights, and is merged into what" in line for line in said)
    wrong = wrongly_merged(keys)
    assert (wrong - beside).norm() > 0.05 * beside.norm()


def wrongly_merged(keys):
    """W + s B A with the original W, by plain peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"], dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, keys["adapter_name_or_path"]).eval()(torch.arange(1, 40)[None]).logits


def test_on_other_weights_it_is_refused_with_the_keys_it_needs(trained, tmp_path):
    keys, bits, world = trained
    words = rf"was trained with loftq_init.*quantization_method: {bits['quantization_method']}, quantization_bit: 4"
    with pytest.raises(ModelError, match=words):
        logits_of(keys)
    with pytest.raises(ModelError, match=words):
        luthier.export({**keys, "export_dir": str(tmp_path / "out")})
    with pytest.raises(ModelError, match=words):
        luthier.export({**keys, **bits, "quantization_bit": 8, "export_dir": str(tmp_path / "out")})
    adapter = keys["adapter_name_or_path"]
    run = {**world, "finetuning_type": "lora", "output_dir": str(tmp_path / "o"), "adapter_name_or_path": adapter}
    for more in ({}, {"create_new_adapter": True}):
        with pytest.raises(ModelError, match=words):
            luthier.train({**run, **more})
    other = tmp_path / "other"
    plain = {**run, "adapter_name_or_path": None, "output_dir": str(other), "max_steps": 1}
    luthier.train({key: value for key, value in plain.items() if value is not None})
    assert not (other / LOFTQ_FILE).exists()
    with pytest.raises(ModelError, match=words + r".*and this adapter first"):
        luthier.export(
            {**keys, **bits, "adapter_name_or_path": f"{other},{adapter}", "export_dir": str(tmp_path / "o")}
        )


def test_it_goes_on_and_stays_what_it_is(trained, tmp_path):
    keys, bits, world = trained
    run = {**world, **bits, "finetuning_type": "lora", "adapter_name_or_path": keys["adapter_name_or_path"]}
    luthier.train({**run, "max_steps": 1, "output_dir": str(tmp_path / "on")})
    files = [Path(folder) / LOFTQ_FILE for folder in (keys["adapter_name_or_path"], tmp_path / "on")]
    assert keys_in(json.loads(files[0].read_text())) == keys_in(json.loads(files[1].read_text()))


def test_keys_that_quantize_are_not_read_by_an_export_of_other_adapters(trained, tmp_path):
    keys, bits, _ = trained
    other = {**keys, **bits, "export_dir": str(tmp_path / "o"), "adapter_name_or_path": str(tmp_path)}
    assert [warning.key for warning in load_export(other).warnings] == ["quantization_bit"]
    assert not load_export({**other, "adapter_name_or_path": keys["adapter_name_or_path"]}).warnings


@pytest.mark.parametrize("content", ["{", "[]", '{"quantization_bit": 4}', '{"weights_read_in": [], "computed_in": 1}'])
def test_a_record_that_is_damaged_is_said(trained, tmp_path, content):
    keys, bits, _ = trained
    folder = Path(shutil.copytree(keys["adapter_name_or_path"], tmp_path / "lora"))
    (folder / LOFTQ_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{LOFTQ_FILE}: cannot be read"):
        logits_of({**keys, **bits, "adapter_name_or_path": str(folder)})


def test_weights_that_are_stored_the_other_way_round_are_rounded_in_their_own_layout(tmp_path):
    """GPT-2 has them as (in, out), and that of an output projection is square: a mix-up would have its shape."""
    from transformers import GPT2Config

    base = save_tiny(tmp_path, GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2))
    model, original = fresh(base), fresh(base)
    keys = QuantizationConfig(quantization_bit=4)
    how = Quantization(QUANTIZERS.get("bnb"), keys, "cpu")
    round_weights(model, how, describe(keys, torch.float32, torch.float32))
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        rounded, exact = (one.get_submodule(f"transformer.h.0.{name}").weight for one in (model, original))
        assert 0.01 < (rounded - exact).norm() / exact.norm() < 0.2
