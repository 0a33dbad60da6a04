"""An adapter that a server would apply wrongly is refused with the way out."""

import json

import pytest

from luthier.config.keys.model import ModelConfig
from luthier.core.errors import ModelError
from luthier.infer.servers.adapter import Limits, adapter_folder
from tests.workflow.test_export import adapter

VLLM, SGLANG = Limits("vLLM", 32, "vllm_max_lora_rank"), Limits("SGLang", None, one_scale=True)


@pytest.fixture(scope="module")
def plain(llama_folder, tmp_path_factory):
    return adapter(llama_folder, tmp_path_factory.mktemp("adapter") / "lora")


def keys(*names, **more) -> ModelConfig:
    return ModelConfig(model_name_or_path="m", adapter_name_or_path=tuple(map(str, names)), **more)


@pytest.fixture
def changed(plain, tmp_path):
    """(changes of adapter_config.json) -> the keys of a run with that adapter."""

    def change(**config) -> ModelConfig:
        for file in plain.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return keys(tmp_path)

    return change


@pytest.mark.parametrize("limits", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_a_plain_adapter_is_taken(plain, limits):
    assert adapter_folder(keys(plain), limits) == plain
    assert adapter_folder(keys(plain.parent, adapter_folder="lora"), limits) == plain
    assert adapter_folder(keys(), limits) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "OFT"}, "the method OFT"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [3]}, "rows of new tokens"),
        ({"target_parameters": ["experts.w"]}, "adapted parameters"),
        ({"layer_replication": [[0, 1]]}, "repeated layers"),
        ({"init_lora_weights": "pissa"}, "changed base weights .init_lora_weights: pissa."),
        ({"init_lora_weights": "loftq"}, "changed base weights"),
    ],
    ids=str,
)
@pytest.mark.parametrize("limits", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_what_no_server_applies_is_refused(changed, config, words, limits):
    remedy = f"which {limits.server} cannot apply -> merge it with `luthier export`"
    with pytest.raises(ModelError, match=rf"this adapter has .*{words}.*, {remedy}"):
        adapter_folder(changed(**config), limits)


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"rank_pattern": {"q": 8}}, {"alpha_pattern": {"q": 8}}])
def test_sglang_scales_all_layers_alike(changed, config):
    adapter_folder(changed(**config), VLLM)
    with pytest.raises(ModelError, match="which SGLang cannot apply"):
        adapter_folder(changed(**config), SGLANG)


@pytest.mark.parametrize("config", [{"r": 64}, {"rank_pattern": {"q_proj": 64}}])
def test_a_rank_above_the_limit_names_the_key_that_raises_it(changed, config):
    with pytest.raises(ModelError, match="has the rank 64, and vllm_max_lora_rank is 32 -> set vllm_max_lora_rank to"):
        adapter_folder(changed(**config), VLLM)


def test_weights_that_are_no_lora_are_refused(llama_folder, tmp_path):
    folder = adapter(llama_folder, tmp_path / "lora", modules_to_save=["lm_head"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    with pytest.raises(ModelError, match=r"weights that are no LoRA \(.*lm_head"):
        adapter_folder(keys(folder), VLLM)
