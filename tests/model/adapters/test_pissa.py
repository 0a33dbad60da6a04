"""PiSSA: starts as peft does, is saved as a plain adapter of the original model, and training goes on from that."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.model.adapters._merge import GivenAdapters, attach_adapter, merge_adapters
from luthier.model.adapters._pissa import is_pissa, resume_pissa
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.save import save_adapter
from tests.model.adapters.test_lora import adapt, build, logits, train_a_little
from tests.model.adapters.test_merge import fresh
from tests.tiny import tiny_llama

BASE = {"model_name_or_path": "m", "dataset": "d", "template": "qwen", "output_dir": "o", "do_train": True}
TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(("iterations", "start"), [(-1, "pissa"), (4, "pissa_niter_4")])
@pytest.mark.parametrize("rslora", [False, True])
def test_start_and_training_equal_those_of_plain_peft(iterations, start, rslora):
    torch.manual_seed(5)
    ours = adapt(
        build(), pissa_init=True, pissa_iter=iterations, lora_rank=4, lora_target=tuple(TARGETS), use_rslora=rslora
    )
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_rslora": rslora, "task_type": "CAUSAL_LM"}
    base = build()
    torch.manual_seed(0)
    plain = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=start, **settings))
    if iterations == -1:
        expected = plain.state_dict()
        assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in ours.state_dict().items())
        assert train_a_little(ours) == pytest.approx(train_a_little(plain), abs=1e-5)
    torch.testing.assert_close(logits(ours), logits(plain if iterations == -1 else build()), atol=1e-5, rtol=0)


def test_the_principal_parts_are_taken_out_of_the_weight():
    """With rank r and W = U S V^T, what is left has the singular values of W from the (r + 1)th on."""
    values = torch.linalg.svdvals(build().model.layers[0].self_attn.q_proj.weight)
    adapted = adapt(build(), pissa_init=True, pissa_iter=-1, lora_rank=8)
    rest = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:-8], values[8:], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(adapted), logits(build()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True, "lora_alpha": 5}, {"additional_target": ("embed_tokens",)}])
def test_what_is_saved_is_a_plain_adapter_of_the_original_model(tmp_path, keys):
    folder = tiny_llama(tmp_path / "base")
    adapted = adapt(fresh(folder), pissa_init=True, lora_rank=4, **keys)
    train_a_little(adapted)
    expected = logits(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["use_rslora"]) == (8, True, False)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    merged = merge_adapters(fresh(folder), [str(tmp_path / "adapter")], GivenAdapters())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path):
    adapted = adapt(build("gpt2"), pissa_init=True, lora_rank=4)
    torch.testing.assert_close(logits(adapted), logits(build("gpt2")), atol=1e-5, rtol=0)
    train_a_little(adapted)
    save_adapter(adapted, tmp_path)
    merged = merge_adapters(build("gpt2"), [str(tmp_path)], GivenAdapters())
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=0)


def test_going_on_reads_both_pairs_of_factors(tmp_path):
    """On another start (here: other random numbers) the rest of each weight is mended to that of the saved one."""
    first = adapt(build(), pissa_init=True, pissa_iter=1, lora_rank=4)
    train_a_little(first)
    save_adapter(first, tmp_path / "one")
    model = build()
    torch.manual_seed(99)
    second = adapt(model, pissa_init=True, pissa_iter=1, lora_rank=4)
    assert is_pissa(second)
    resume_pissa(second, tmp_path / "one")
    torch.testing.assert_close(logits(second), logits(first), atol=1e-5, rtol=0)
    save_adapter(second, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_training_on_from_a_saved_one_is_plain_lora(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    adapted = adapt(fresh(folder), pissa_init=True, lora_rank=4)
    train_a_little(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    going_on = attach_adapter(fresh(folder), str(tmp_path / "adapter"), GivenAdapters(), is_trainable=True)
    assert not is_pissa(going_on) and going_on.peft_config["default"].r == 8


def test_experts_are_left_out_and_that_is_said(said):
    adapt(build("qwen3_moe"), pissa_init=True, lora_rank=4)
    assert any("pissa_init: is not possible for weights outside of layers" in text for text in said)


@pytest.mark.parametrize("iterations", [-1, 16])
def test_a_rank_that_a_weight_does_not_have(iterations, tmp_path):
    """All of the weight is in the adapter, whose rest starts as in LoRA and is trained."""
    model = build()
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, pissa_init=True, pissa_iter=iterations, lora_rank=40)
    layer = adapted.get_base_model().model.layers[0].self_attn.k_proj
    assert layer.base_layer.weight.abs().max() < 1e-5
    assert layer.lora_A["default"].weight[32:].abs().min() > 0 and not layer.lora_B["default"].weight[:, 32:].any()
    torch.testing.assert_close(logits(adapted), logits(build()), atol=1e-5, rtol=0)
    train_a_little(adapted)
    assert layer.lora_B["default"].weight[:, 32:].any()
    save_adapter(adapted, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(fresh(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-5, rtol=0)


def test_it_starts_in_16_bits_too(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    model = load_model(ModelSource(str(folder)), dtype=torch.bfloat16)
    adapted = adapt(model, pissa_init=True, lora_rank=4)
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj
    original = fresh(folder).model.layers[0].mlp.down_proj.weight.bfloat16().float()
    again = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    torch.testing.assert_close(again, original, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, "only one of them can be undone"),
        ({"stage": "dpo"}, "needs as its reference"),
        ({"pissa_iter": -2}, "-1 for the exact decomposition"),
        ({"fsdp": "full_shard"}, "has to see whole weights"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "has to see whole weights"),
        ({"quantization_bit": 4}, "quantized weights cannot give"),
    ],
)
def test_rules(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train({**BASE, "pissa_init": True, **keys})


@pytest.mark.parametrize("key", ["pissa_iter", "pissa_convert"])
def test_a_key_that_needs_pissa_init(key):
    (warning,) = load_train({**BASE, key: 4 if key == "pissa_iter" else True}).warnings
    assert warning.key == key and "only if pissa_init is on" in warning.reason
