"""What `lora_target` means in a mixture of experts, where layers and stacked weights share names."""

from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters, attach_adapter
from luthier.model.adapters._targets import Targets, find_targets
from luthier.model.adapters.lora import LoraConfig
from luthier.model.modules import linear_layers
from luthier.model.multimodal import find_parts, in_parts
from tests.runs.test_architectures import ARCHITECTURES, ROUTED, SIZES, build, logits

DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def adapted_weights(**config) -> set[str]:
    """The last parts of the names of what got an adapter in a Qwen3 mixture whose first layer is dense."""
    model = ADAPTERS.get("lora").apply(
        build("qwen3_moe"),
        LoraConfig(lora_rank=2, **config),
        given=GivenAdapters(),
        pure_bf16=False,
    )
    names = [name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name]
    return {".".join(name.removesuffix(".base_layer").split(".")[5:]) for name in names}


def test_all_names_layers_experts_and_dense_layers():
    targets = find_targets(build("qwen3_moe"), ("all",), "lora_target")
    assert targets == Targets(
        ("k_proj", "o_proj", "q_proj", "v_proj"), ("experts.gate_up_proj", "experts.down_proj", *DENSE)
    )


def test_a_name_means_every_weight_that_has_it():
    assert adapted_weights(lora_target=("q_proj",)) == {"self_attn.q_proj"}
    assert adapted_weights(lora_target=("experts",)) == {"mlp.experts"}
    assert adapted_weights(lora_target=("down_proj",)) == {"mlp.down_proj", "mlp.experts"}


def test_names_of_when_experts_were_layers():
    """They mean the experts and the dense layers of the same names, as they did then."""
    everything = {"mlp.experts", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert adapted_weights(lora_target=("gate_proj", "up_proj", "down_proj")) == everything
    with pytest.raises(ModelError, match=r"lora_target: gate_proj: .*up_proj"):
        adapted_weights(lora_target=("gate_proj",))


@pytest.mark.parametrize("why", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_experts_cannot_have_leaves_them_out(why, said):
    names = adapted_weights(**why)
    assert names == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert any(f"{next(iter(why))}: is not possible" in text and "experts.down_proj" in text for text in said)


def test_an_unknown_name_lists_experts_too():
    with pytest.raises(ModelError, match="gate_up_proj"):
        find_targets(build("mixtral"), ("gate_up_prj",), "lora_target")


def test_an_adapter_of_when_experts_were_layers_still_loads(tmp_path):
    """Its file names `experts.0.w1` and so on; peft stacks these, and luthier does not take them for a misfit."""
    from safetensors.torch import save_file

    model, generator = build("mixtral"), torch.Generator().manual_seed(0)
    sizes = {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for word, (width_in, width_out) in sizes.items():
                start = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{word}"
                tensors[f"{start}.lora_A.weight"] = torch.randn(2, width_in, generator=generator)
                tensors[f"{start}.lora_B.weight"] = torch.randn(width_out, 2, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path
    )
    before = logits(build("mixtral"))
    adapted = attach_adapter(model, str(tmp_path), GivenAdapters(), is_trainable=False)
    plain = peft.PeftModel.from_pretrained(build("mixtral"), str(tmp_path))
    assert torch.equal(logits(adapted), logits(plain))
    assert (logits(adapted) - before).abs().max() > 0.1


def test_there_are_enough_architectures():
    assert len(ARCHITECTURES) >= 60


def test_a_last_name_that_other_modules_share_is_written_out():
    """Else peft would meet a norm of the same name as a layer."""
    model = build("llama")
    assert "q_proj" in find_targets(model, ("all",), "lora_target").modules
    model.model.beside = torch.nn.ModuleDict({"q_proj": torch.nn.LayerNorm(4)})
    found = find_targets(model, ("all",), "lora_target").modules
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(found) == sorted(name for name in linear if name != "lm_head")


def glm4v_moe() -> Any:
    """A mixture of experts that sees, whose encoder has dense layers of the same names as the language model."""
    text = {**SIZES, **ROUTED, "head_dim": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
    config = AutoConfig.for_model(
        "glm4v_moe",
        text_config={**text, "rope_parameters": axes},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_id=5,
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.name_or_path = ""
    return model


@pytest.mark.parametrize("target", [("all",), ("q_proj", "down_proj")])
@pytest.mark.parametrize("part", ["encoders", "language"])
def test_frozen_parts_get_no_adapter_where_a_layer_is_named_by_its_weight(part, target):
    model = glm4v_moe()
    parts = find_parts(model)
    closed, open_ = (parts.encoders, parts.language) if part == "encoders" else (parts.language, parts.encoders)
    frozen = (*closed, *parts.projector)
    if part == "language" and target != ("all",):
        target = ("qkv", "down_proj")
    expected = {
        name
        for name, _ in linear_layers(model)
        if in_parts(name, open_) and name != "lm_head" and (target == ("all",) or name.split(".")[-1] in target)
    }
    if part == "encoders":
        expected.add("model.language_model.layers.1.mlp.experts")
    config = LoraConfig(lora_rank=2, lora_target=target)
    adapted = ADAPTERS.get("lora").apply(model, config, given=GivenAdapters(), frozen=frozen, pure_bf16=False)
    names = [name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names} == expected
