"""Adapters: exactly the right weights learn, and what is saved loads elsewhere and merges to the same logits."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters, attach_adapter, merge_adapters
from luthier.model.adapters._targets import find_targets
from luthier.model.adapters.freeze import FreezeConfig, layers_to_train
from luthier.model.adapters.full import FullConfig
from luthier.model.adapters.lora import LoraConfig
from luthier.model.loading.load import load_model, prepare_for_training
from luthier.model.loading.parameters import count_parameters
from tests.tiny import TINY_LLAMA, tiny_llama

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "tie_word_embeddings": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {},
    "qwen3_moe": MOE,
    "starcoder2": {"tie_word_embeddings": True},
    "olmo2": {},
    "cohere": {"tie_word_embeddings": True},
    "granite": {},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
}
IDS = torch.arange(3, 40)[None]


def build(name: str = "llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TINY_LLAMA, **ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def adapt(model, given: GivenAdapters = GivenAdapters(), *, train_embeddings: bool = False, **config):  # noqa: B008
    return ADAPTERS.get("lora").apply(
        model, LoraConfig(**config), given=given, train_embeddings=train_embeddings, pure_bf16=False
    )


def train_a_little(model, steps: int = 4, learning_rate: float = 0.01):
    """Returns the losses."""
    prepare_for_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_learns_and_the_merged_model_says_the_same(name, tmp_path):
    model = build(name)
    base_state = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = adapt(model, lora_rank=4, lora_target=("all",))
    losses = train_a_little(adapted)
    assert losses[-1] < losses[0]
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    fresh = build(name)
    assert all(torch.equal(value, base_state[key]) for key, value in fresh.state_dict().items())
    merged = merge_adapters(fresh, [str(tmp_path / "adapter")], GivenAdapters())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=0)


def test_all_is_every_linear_layer_but_the_head():
    model = build()
    targets = find_targets(model, ("all",), "lora_target")
    assert targets.modules == tuple(
        sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    )
    assert targets.parameters == ()
    adapted = adapt(model, lora_rank=4)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 14 <= len(linear)
    assert not any("lm_head" in name and "lora" in name for name, _ in adapted.named_parameters())


def test_parameters_of_two_named_projections_are_counted_by_hand():
    """Rank 8 on q (64 -> 64) and v (64 -> 32) of two layers: 2 (8 x 64 + 64 x 8 + 8 x 64 + 32 x 8)."""
    adapted = adapt(build(), lora_target=("q_proj", "v_proj"))
    trainable, total = count_parameters(adapted)
    assert trainable == 2 * (8 * 64 + 64 * 8 + 8 * 64 + 32 * 8)
    assert total == trainable + sum(p.numel() for p in build().parameters())
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_dora_and_rslora_reach_peft(option):
    adapted = adapt(build(), **{option: True}, lora_alpha=32)
    assert getattr(adapted.peft_config["default"], option)
    losses = train_a_little(adapted)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_target": ("q_prj",)}, ["lora_target", "'q_prj'", "did you mean 'q_proj'", "down_proj"]),
        ({"lora_target": ("self_attn",)}, ["lora_target", "self_attn", "name linear layers"]),
        ({"additional_target": ("embed",)}, ["additional_target", "'embed'", "embed_tokens"]),
    ],
)
def test_a_name_that_no_module_has_is_an_error_that_lists_the_names(config, words):
    with pytest.raises(ModelError) as caught:
        adapt(build(), **config)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_learn_when_the_vocabulary_has_grown(tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    model.resize_token_embeddings(384)
    adapted = adapt(model, train_embeddings=True)
    learning = {name for name, weight in adapted.named_parameters() if weight.requires_grad and "lora" not in name}
    assert any("embed_tokens" in name for name in learning)
    assert any("lm_head" in name for name in learning) or tied
    train_a_little(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    merged = merge_adapters(build(tie_word_embeddings=tied), [str(tmp_path)], GivenAdapters())
    assert logits(merged).shape[-1] == 384
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    if tied:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.fixture
def two_adapters(tmp_path):
    """Two different adapters of the same base, and the base's folder."""
    folder = tiny_llama(tmp_path / "base")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        adapted = adapt(load_model(str(folder), dtype=torch.float32), lora_target=("q_proj", "down_proj"))
        train_a_little(adapted, learning_rate=0.02 * (1 + seed))
        adapted.save_pretrained(tmp_path / name)
    return folder, str(tmp_path / "first"), str(tmp_path / "second")


def fresh(folder):
    return load_model(str(folder), dtype=torch.float32)


def test_the_last_given_adapter_is_trained_on_and_those_before_are_merged(two_adapters):
    folder, first, second = two_adapters
    merged = logits(merge_adapters(fresh(folder), [first, second], GivenAdapters()))
    going_on = adapt(fresh(folder), GivenAdapters((first, second)))
    torch.testing.assert_close(logits(going_on), merged, atol=1e-5, rtol=0)
    assert count_parameters(going_on)[0] > 0
    assert {name for name, p in going_on.named_parameters() if p.requires_grad} == {
        name for name, _ in going_on.named_parameters() if "lora_" in name
    }


def test_with_create_new_adapter_all_are_merged_and_a_fresh_one_changes_nothing_yet(two_adapters):
    folder, first, second = two_adapters
    merged = logits(merge_adapters(fresh(folder), [first, second], GivenAdapters()))
    new = adapt(fresh(folder), GivenAdapters((first, second)), create_new_adapter=True, lora_rank=2)
    torch.testing.assert_close(logits(new), merged, atol=1e-5, rtol=0)
    assert new.peft_config["default"].r == 2


def test_adapter_folder_is_the_folder_inside(two_adapters, tmp_path):
    folder, first, _ = two_adapters
    given = GivenAdapters((str(tmp_path),), folder="first")
    expected = logits(merge_adapters(fresh(folder), [first], GivenAdapters()))
    assert torch.equal(logits(merge_adapters(fresh(folder), given.names, given)), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, ["does not fit", "size mismatch"]),
        ({"num_hidden_layers": 1}, ["does not fit", "has weights for what the model does not have"]),
        ({"num_hidden_layers": 3}, ["does not fit", "has no weights for"]),
    ],
)
def test_an_adapter_of_another_model_is_refused(two_adapters, tmp_path, changes, words):
    other = tiny_llama(tmp_path / "other", **changes)
    with pytest.raises(ModelError) as caught:
        attach_adapter(fresh(other), two_adapters[1], GivenAdapters(), is_trainable=True)
    assert all(word in str(caught.value) for word in [*words, "model_name_or_path", str(two_adapters[0])])


def test_an_adapter_of_another_architecture_is_refused(two_adapters):
    with pytest.raises(ModelError, match="does not fit"):
        attach_adapter(build("gpt2"), two_adapters[1], GivenAdapters(), is_trainable=True)


def test_an_adapter_of_a_model_of_another_name_is_used_with_a_warning(two_adapters, tmp_path, said):
    other = tiny_llama(tmp_path / "namesake")
    attach_adapter(fresh(other), two_adapters[1], GivenAdapters(), is_trainable=False)
    assert any("was trained on" in message for message in said)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "weights are missing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(
                (folder / "adapter_model.safetensors").read_bytes()[:-100]
            ),
            "cut off",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_damaged_adapter_is_named(two_adapters, tmp_path, spoil, words):
    spoil(tmp_path / "first")
    with pytest.raises(ModelError, match=words):
        merge_adapters(fresh(two_adapters[0]), [two_adapters[1]], GivenAdapters())


def test_full_trains_everything():
    model = ADAPTERS.get("full").apply(
        build().requires_grad_(False), FullConfig(), given=GivenAdapters(), train_embeddings=False, pure_bf16=False
    )
    trainable, total = count_parameters(model)
    assert trainable == total


def freeze(model, *, train_embeddings=False, **config):
    return ADAPTERS.get("freeze").apply(
        model, FreezeConfig(**config), given=GivenAdapters(), train_embeddings=train_embeddings, pure_bf16=False
    )


def learning(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_freeze_trains_the_last_or_the_first_layers():
    model = build(num_hidden_layers=4)
    last = learning(freeze(model, freeze_trainable_layers=1))
    assert last == {name for name, _ in model.named_parameters() if ".layers.3." in name}
    first = learning(freeze(model, freeze_trainable_layers=-2))
    assert first == {n for n, _ in model.named_parameters() if ".layers.0." in n or ".layers.1." in n}


def test_freeze_trains_named_modules_inside_and_outside_the_layers():
    model = freeze(
        build(), freeze_trainable_layers=1, freeze_trainable_modules=("mlp",), freeze_extra_modules=("lm_head", "norm")
    )
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert learning(model) == mlp | {"lm_head.weight", "model.norm.weight"}


def test_freeze_finds_layers_by_structure():
    assert learning(freeze(build("gpt2"), freeze_trainable_layers=1)) == {
        name for name, _ in build("gpt2").named_parameters() if ".h.1." in name
    }


@pytest.mark.parametrize("key", ["freeze_trainable_modules", "freeze_extra_modules"])
def test_freeze_lists_the_names_it_knows(key):
    with pytest.raises(ModelError) as caught:
        freeze(build(), **{key: ("mlpp",)})
    assert key in str(caught.value)
    assert ("mlp" if key == "freeze_trainable_modules" else "embed_tokens") in str(caught.value)


def test_more_layers_than_there_are_is_all_of_them():
    assert list(layers_to_train(2, 5)) == [0, 1]
    assert list(layers_to_train(2, -5)) == [0, 1]


def test_an_adapter_loads_in_plain_peft(two_adapters):
    from peft import AutoPeftModelForCausalLM

    folder, first, _ = two_adapters
    expected = logits(attach_adapter(fresh(folder), first, GivenAdapters(), is_trainable=False))
    assert json.loads((folder.parent / "first" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = AutoPeftModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected, atol=1e-6, rtol=0)
