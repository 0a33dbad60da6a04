"""HQQ checkpoints: both layouts give the model that was saved, an adapter learns beside it, and damage is told."""

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
from luthier.model.files.sources import ModelSource, check_source
from luthier.model.quantization import _prequantized
from luthier.model.quantization._layers import num_layer_bytes, num_weights, quantized_layers
from luthier.model.quantization._prequantized import prequantized_format_in
from luthier.workflow.preflight import load_checked
from tests.small_world import losses, small_world
from tests.tiny import TINY_LLAMA, byte_tokenizer, save_tiny

pytest.importorskip("hqq", reason="the library hqq, which reads HQQ, is not installed")
IDS = torch.arange(1, 40)[None]
LAYOUTS = ("transformers", "library")


@torch.no_grad()
def logits_of(model):
    return model(IDS.to(model.device)).logits


def infer(folder, **keys):
    return load_for_inference(load_infer({"model_name_or_path": str(folder), **keys}))


def quantized(folder, dtype=torch.float32, **how):
    """The model in `folder`, with every linear layer but the head in HQQ's own layer."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import AutoModelForCausalLM

    settings = BaseQuantizeConfig(**{"nbits": 4, "group_size": 32, "axis": 1, **how})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not name.endswith("lm_head"):
            model.set_submodule(name, HQQLinear(module, settings, compute_dtype=dtype, device="cpu"))
    return model


def save(model, folder: Path, layout: str) -> Path:
    """As transformers 4 did (its settings stand in config.json), or as the library does."""
    if layout == "library":
        from hqq.models.hf.base import AutoHQQHFModel

        AutoHQQHFModel.save_quantized(model, str(folder))
        assert not (folder / "model.safetensors").exists()
    else:
        folder.mkdir(parents=True)
        tensors = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        weights = {"nbits": 4, "group_size": 32, "axis": 1}
        described = {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": weights},
            "skip_modules": ["lm_head"],
        }
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": described}), "utf-8")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def world(tmp_path) -> dict[str, Any]:
    keys = small_world(tmp_path / "world")
    return {**keys, "finetuning_type": "lora", "learning_rate": 1e-2, "max_steps": 3, "output_dir": str(tmp_path / "o")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", [{}, {"nbits": 3}, {"nbits": 2, "axis": 0, "group_size": 64}, {"view_as_float": True}])
def test_the_model_that_was_saved_comes_back(tmp_path, layout, how):
    from transformers import Qwen2Config

    original = save_tiny(tmp_path / "original", Qwen2Config(**TINY_LLAMA))  # with biases
    saved = quantized(original, **how)
    for name, module in saved.named_modules():
        if name.endswith("q_proj"):
            module.bias.normal_()
    folder = save(saved, tmp_path / "hqq", layout)
    assert prequantized_format_in(folder)[0] == "hqq"
    model = infer(folder)
    assert torch.equal(logits_of(model), logits_of(saved))
    assert (logits_of(model) - logits_of(infer(original))).norm() > 0.01
    layers = [layer for _, layer in quantized_layers(model)]
    assert len(layers) == 14 and not any("weight" in layer._parameters for layer in layers)


def test_zeros_that_are_quantized_themselves_are_read_from_old_files(world, tmp_path):
    """8 bits, one scale for all zeros of a layer; the settings lay in a dict of their own."""
    from hqq.core.quantize import Quantizer

    saved = quantized(world["model_name_or_path"])
    how = {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False, "device": "cpu"}
    for _, layer in quantized_layers(saved):
        zero = layer.meta.pop("zero")
        layer.meta["zero_q"], settings = Quantizer.quantize(zero, **how)
        layer.meta |= {"quant_zero": True, "meta_zero": settings | {"compute_dtype": torch.float32}}
        assert not torch.equal(Quantizer.dequantize(layer.meta["zero_q"], layer.meta["meta_zero"]), zero)
    folder = save(saved, tmp_path / "hqq", "library")
    modules = torch.load(folder / "qmodel.pt", weights_only=True)
    for state in modules.values():
        if "W_q" in state:
            weight, state["meta"] = state.pop("W_q"), dict(state)
            state["W_q"] = weight
            for key in state["meta"]:
                state.pop(key, None)
    torch.save(modules, folder / "qmodel.pt")
    assert torch.allclose(logits_of(infer(folder)), logits_of(saved), atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bits_in_the_file_are_16_bits_in_memory(world, tmp_path, layout):
    saved = quantized(world["model_name_or_path"], torch.bfloat16)
    folder = save(saved, tmp_path / "hqq", layout)
    assert torch.equal(logits_of(infer(folder, infer_dtype="bfloat16")), logits_of(saved))
    model = infer(folder, infer_dtype="float32")
    assert (logits_of(model) - logits_of(saved)).norm() < 0.02 * logits_of(saved).float().norm()
    for _, layer in quantized_layers(model):  # 4 bits, and two numbers of 16 bits for 32 of them
        assert num_layer_bytes(layer) == num_weights(layer) * (4 + 2 * 16 / 32) / 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_learns_beside_it_goes_on_and_answers(world, tmp_path, layout, said):
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", layout)
    keys = {**world, "model_name_or_path": str(folder), "quantization_bit": 4, "quantization_method": "hqq"}
    first = losses(luthier.train(keys))
    assert first[-1] < first[0] - 0.05
    assert any("quantized already (HQQ), so it is not read" in line for line in said)
    weights = load_file(Path(world["output_dir"]) / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name), "some layers got no gradient"
    adapter = {"model_name_or_path": str(folder), "adapter_name_or_path": world["output_dir"]}
    expected = logits_of(infer(folder))
    beside = infer(folder, adapter_name_or_path=world["output_dir"])
    assert (logits_of(beside) - expected).norm() > 0.05 * expected.norm()
    more = losses(luthier.train({**world, **adapter, "output_dir": str(tmp_path / "more")}))
    assert more[0] < first[-1]
    with pytest.raises(ModelError, match="cannot be merged into them -> give the model that it was quantized from"):
        luthier.export({**adapter, "template": "chatml", "export_dir": str(tmp_path / "merged")})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chat_answers_as_the_model_that_was_saved(world, tmp_path, layout):
    saved = quantized(world["model_name_or_path"])
    folder = save(saved, tmp_path / "hqq", layout)
    keys = {"template": "chatml", "do_sample": False, "max_new_tokens": 12}
    session = luthier.chat({"model_name_or_path": str(folder), **keys})
    prompt = "<|im_start|>user\nSay the number 3.<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    expected = saved.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert session.ask("Say the number 3.") == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_model_learns_beside_it(world, tmp_path, layout):
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", layout)
    keys = {**world, "model_name_or_path": str(folder), "stage": "rm", "dataset": "pairs"}
    found = losses(luthier.train(keys))
    assert found[-1] < found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_without_adapter_is_read_again(world, tmp_path, layout):
    saved = quantized(world["model_name_or_path"])
    folder = save(saved, tmp_path / "hqq", layout)
    keys = {"model_name_or_path": str(folder), "template": "chatml", "export_dir": str(tmp_path / "exported")}
    assert torch.equal(logits_of(infer(luthier.export(keys))), logits_of(saved))


def change(folder: Path, layout: str, alter) -> None:
    """`alter(layer)` on what is stored of one layer."""
    name = "model.layers.1.mlp.down_proj"
    if layout == "library":
        modules = torch.load(folder / "qmodel.pt", weights_only=True)
        alter(modules[name])
        torch.save(modules, folder / "qmodel.pt")
        return
    tensors = load_file(folder / "model.safetensors")
    layer = {key.rpartition(".")[2]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
    alter(layer)
    save_file(tensors | {f"{name}.{key}": value for key, value in layer.items()}, folder / "model.safetensors")


DAMAGE = [
    (lambda layer: layer.pop("scale"), r"down_proj cannot be read \(scale is missing\)"),
    (lambda layer: layer.pop("packing"), r"down_proj cannot be read \(packing is missing\)"),
    (lambda layer: layer.update(W_q=layer["W_q"][:-1].clone()), r"its W_q is \(127, 32\) instead of \(128, 32\)"),
    (lambda layer: layer.update(zero=layer["zero"][:-1].clone()), r"its zero is \(255, 1\) instead of \(256, 1\)"),
    (lambda layer: layer.update(shape=torch.tensor([64, 64])), r"it is \(64, 64\), and \(64, 128\) in config.json"),
    (
        lambda layer: layer.pop("W_q"),
        r"weights of the model are not in its files \(model.layers.1.mlp.down_proj.weight",
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("alter", "message"), DAMAGE)
def test_damage_is_one_error(world, tmp_path, layout, alter, message):
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", layout)
    change(folder, layout, alter)
    with pytest.raises(ModelError, match=message):
        infer(folder)


@pytest.mark.parametrize(("layout", "file"), zip(LAYOUTS, ("model.safetensors", "qmodel.pt"), strict=True))
def test_a_file_that_is_cut_off_is_one_error(world, tmp_path, layout, file):
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", layout)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    for load in (infer, lambda folder: check_source(ModelSource(str(folder)))):  # the second before torch is imported
        with pytest.raises(ModelError, match=f"{file}: this file is cut off or damaged.* -> copy or download it again"):
            load(folder)


def test_a_qmodel_that_holds_something_else_is_one_error(world, tmp_path):
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", "library")
    for content in ([1, 2], {"model": torch.ones(1)}, {"model": Path("a")}):
        torch.save(content, folder / "qmodel.pt")
        with pytest.raises(
            ModelError, match=r"qmodel.pt: this is not a complete HQQ file \(.*\) -> copy or download it"
        ):
            infer(folder)


def test_words_in_a_file_are_not_run(world, tmp_path):
    """The library gives the names of formats to `eval`."""
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", "transformers")
    program = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    change(folder, "transformers", lambda layer: layer.update(compute_dtype=torch.tensor(list(program)).byte()))
    infer(folder)
    assert not (tmp_path / "ran").exists()


def test_experts_that_are_quantized_one_by_one_are_refused(tmp_path):
    from transformers import MixtralConfig

    folder = save_tiny(tmp_path / "mixtral", MixtralConfig(**TINY_LLAMA, num_local_experts=2, num_experts_per_tok=1))
    saved = quantized(folder)
    tensors = load_file(save(saved, tmp_path / "hqq", "transformers") / "model.safetensors")
    attention = "model.layers.0.self_attn.q_proj."
    stored = {name.removeprefix(attention): value for name, value in tensors.items() if name.startswith(attention)}
    experts = {f"model.layers.0.block_sparse_moe.experts.0.w1.{key}": value.clone() for key, value in stored.items()}
    save_file(tensors | experts, tmp_path / "hqq" / "model.safetensors")
    with pytest.raises(ModelError, match="keeps it as a part of a larger tensor, as it does with experts -> give the"):
        infer(tmp_path / "hqq")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_library_is_named_before_weights_are_read(world, tmp_path, monkeypatch, layout):
    folder = save(quantized(world["model_name_or_path"]), tmp_path / "hqq", layout)
    monkeypatch.setattr(_prequantized, "is_installed", lambda name: False)
    with pytest.raises(ConfigError) as caught:
        load_checked("train", read_source({**world, "model_name_or_path": str(folder)}), begins=True)
    (problem,) = caught.value.problems
    assert problem.remedy == "pip install 'luthier[hqq]'" and "HQQ" in problem.reason
    with pytest.raises(MissingExtra, match=r"needs the library hqq.* -> pip install 'luthier\[hqq\]'"):
        infer(folder)
