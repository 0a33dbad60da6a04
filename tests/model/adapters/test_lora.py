"""LoRA: exactly the right weights learn, and what is saved loads elsewhere and merges to the same logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters, merge_adapters
from luthier.model.adapters._targets import find_targets
from luthier.model.adapters.lora import LoraConfig
from luthier.model.embeddings import NewTokens
from luthier.model.loading.parameters import count_parameters
from luthier.model.loading.training import prepare_for_training
from tests.tiny import TINY_LLAMA, byte_tokenizer

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


def adapt(model, given: GivenAdapters = GivenAdapters(), *, new_tokens=None, **config):  # noqa: B008
    return ADAPTERS.get("lora").apply(model, LoraConfig(**config), given=given, new_tokens=new_tokens, pure_bf16=False)


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


def test_dora_is_not_put_on_a_row_of_zeros():
    """Its direction would be 0 / 0."""
    model = build(tie_word_embeddings=True, pad_token_id=256)
    with pytest.raises(ModelError, match="use_dora: lm_head: has a row of zeros"):
        adapt(model, lora_target=("lm_head",), use_dora=True)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_learn_when_the_vocabulary_has_grown(tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    model.resize_token_embeddings(384)
    adapted = adapt(model, new_tokens=NewTokens(byte_tokenizer(), trains_whole=True))
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
