"""OFT: what a rotation does to a layer, and that its adapters are loaded for what they are, whatever the run says."""

import json

import pytest
import torch

from luthier.config.load import load_export, load_train
from luthier.core.errors import ConfigError, ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters, merge_adapters
from luthier.model.adapters.lora import LoraConfig
from luthier.model.adapters.oft import OftConfig
from luthier.model.loading.parameters import count_parameters
from tests.model.adapters.test_lora import build, logits, train_a_little
from tests.model.adapters.test_merge import fresh
from tests.tiny import tiny_llama

BASE = {"model_name_or_path": "m", "dataset": "d", "template": "qwen", "output_dir": "o", "do_train": True}


def rotate(model, given: GivenAdapters = GivenAdapters(), **config):  # noqa: B008
    return ADAPTERS.get("oft").apply(model, OftConfig(**config), given=given, pure_bf16=False).eval()


@pytest.fixture
def rotated(tmp_path):
    """The folder of a base, and of an OFT adapter of it."""
    folder = tiny_llama(tmp_path / "base")
    adapted = rotate(fresh(folder))
    losses = train_a_little(adapted)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "oft")
    return folder, str(tmp_path / "oft"), logits(adapted)


def test_parameters_are_counted_by_hand():
    """Blocks of 32 have 32 x 31 / 2 = 496 angles; widths 64, 64, 64, 64, 64, 64 have two blocks and 128 has four."""
    trainable, _ = count_parameters(rotate(build()))
    assert trainable == 2 * (6 * 2 + 4) * 496


def test_a_rotation_keeps_the_lengths_of_the_rows(rotated):
    """W R has the singular values of W up to the error of the series for the inverse, and is not W."""
    folder, oft, _ = rotated
    before = fresh(folder).model.layers[0].self_attn.q_proj.weight
    after = merge_adapters(fresh(folder), [oft], GivenAdapters()).model.layers[0].self_attn.q_proj.weight
    assert (before - after).abs().max() > 1e-4
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before), atol=0, rtol=0.01)


def test_it_loads_in_plain_peft_and_merges_to_the_same_logits(rotated):
    from peft import AutoPeftModelForCausalLM

    folder, oft, expected = rotated
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(oft, dtype=torch.float32)), expected, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        logits(merge_adapters(fresh(folder), [oft], GivenAdapters())), expected, atol=1e-4, rtol=0
    )


def test_one_step_equals_plain_peft():
    import peft

    settings = {"oft_block_size": 16, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    plain = peft.get_peft_model(build(), peft.OFTConfig(**settings))
    ours = rotate(build(), oft_block_size=16, oft_target=("q_proj", "down_proj"))
    assert train_a_little(ours) == train_a_little(plain)
    assert torch.equal(logits(ours), logits(plain))


@pytest.mark.parametrize("kind", ["oft", "lora"])
def test_an_adapter_goes_on_as_what_its_file_says(rotated, said, kind):
    folder, oft, expected = rotated
    config = {"oft": OftConfig(), "lora": LoraConfig()}[kind]
    model = ADAPTERS.get(kind).apply(fresh(folder), config, given=GivenAdapters((oft,)), pure_bf16=False)
    assert {name.split(".")[-3] for name, weight in model.named_parameters() if weight.requires_grad} == {"oft_R"}
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    assert any("is trained further as it is (OFT, oft_block_size 32)" in text for text in said)


def test_a_lora_adapter_given_to_oft_stays_lora(tmp_path, said):
    folder = tiny_llama(tmp_path / "base")
    lora = ADAPTERS.get("lora").apply(fresh(folder), LoraConfig(lora_rank=4), given=GivenAdapters(), pure_bf16=False)
    lora.save_pretrained(tmp_path / "lora")
    model = rotate(fresh(folder), GivenAdapters((str(tmp_path / "lora"),)))
    assert any("lora_A" in name for name, weight in model.named_parameters() if weight.requires_grad)
    assert any("(LORA, r 4, lora_alpha 8)" in text for text in said)


def test_a_new_rotation_starts_on_top_of_a_merged_one(rotated):
    folder, oft, expected = rotated
    model = rotate(fresh(folder), GivenAdapters((oft,)), create_new_adapter=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_an_adapter_of_another_width_is_refused(rotated, tmp_path):
    with pytest.raises(ModelError, match="does not fit"):
        rotate(fresh(tiny_llama(tmp_path / "wide", hidden_size=128)), GivenAdapters((rotated[1],)))


def test_a_size_that_does_not_divide_is_replaced_and_said(said):
    rotate(build(), oft_block_size=48, oft_target=("q_proj",))
    assert any("oft_block_size: 48: does not divide" in text and "64" in text for text in said)


def test_what_cannot_be_rotated_is_said():
    with pytest.raises(ModelError, match=r"oft_target: .*peft cannot adapt these modules"):
        rotate(build("gpt2"))


def test_rank_instead_of_block_size(tmp_path):
    adapted = rotate(build(), oft_rank=4, lora_target=("q_proj",))
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["oft_block_size"], config["target_modules"]) == (4, 0, ["q_proj"])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"oft_rank": 4, "oft_block_size": 16}, "one of them decides the other"),
        ({"oft_target": "q_proj", "lora_target": "v_proj"}, "former name of the same key"),
        ({"oft_block_size": 1}, "at least 2"),
        ({"module_dropout": 1.0}, "from 0 to below 1"),
        (
            {"quantization_bit": 4, "create_new_adapter": True, "adapter_name_or_path": "a"},
            "would have to be merged into quantized weights",
        ),
    ],
)
def test_rules(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train({**BASE, "finetuning_type": "oft", **keys})


def test_adapters_are_given_to_oft_too():
    run = {"model_name_or_path": "m", "template": "qwen", "adapter_name_or_path": "a", "export_dir": "e"}
    assert load_export({**run, "finetuning_type": "oft"}).warnings == ()
    with pytest.raises(ConfigError, match="lora or oft only"):
        load_export({**run, "finetuning_type": "freeze"})
