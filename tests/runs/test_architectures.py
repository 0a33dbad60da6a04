"""Every architecture of transformers, as a tiny random model: adapted, trained, saved, loaded by others, merged.

What luthier knows of a model it finds from its modules, so what is asked here is asked of each model in the same words.
"""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.kinds import ADAPTERS
from luthier.data.collate import concatenate_rows, pad_rows
from luthier.model.adapters._merge import GivenAdapters, merge_adapters
from luthier.model.adapters.freeze import FreezeConfig
from luthier.model.adapters.lora import LoraConfig
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.heads.output_head import inspect_head
from luthier.model.loading.training import prepare_for_training
from luthier.model.modules import expert_parameters, linear_layers
from luthier.model.save import write_model
from luthier.model.types import Models
from luthier.stages._causal import next_token_loss
from tests.matrix import representatives
from tests.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
HEADS = {"head_dim": 8}
STEADY = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_layer": 2, "n_embd": 32, "n_head": 4, **STEADY, "rotary_dim": 4},
    "cohere": {},
    "cohere2": HEADS,
    "cohere2_moe": {**HEADS, **EXPERTS},
    "deepseek_v2": {**ROUTED, **LATENT, "n_shared_experts": 1, "topk_group": 1, "n_group": 1},
    "deepseek_v3": {**ROUTED, **LATENT, "n_shared_experts": 1, "topk_group": 1, "n_group": 2},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {**HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {**MAMBA, **HEADS, "mamba_d_ssm": 64},
    "gemma": HEADS,
    "gemma2": {**HEADS, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HEADS, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **HEADS,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**HEADS, **ROUTED, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, **STEADY},
    "gpt_bigcode": {"n_layer": 2, "n_embd": 32, "n_head": 4, **STEADY},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 4, **STEADY, "rotary_dim": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
    },
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "internlm3": HEADS,
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minicpm3": {**LATENT, "dim_model_base": 16},
    "minimax": {
        **HEADS,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
    "ministral3": HEADS,
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_5_text": {**HEADS, **LINEAR},
    "qwen3_moe": {**HEADS, **EXPERTS, "mlp_only_layers": [0]},
    "qwen3_next": {**HEADS, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "seed_oss": HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
PADDED = {
    "bloom",
    "falcon",
    "falcon_h1",
    "gpt_neo",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "llama4_text",
    "mamba2",
    "minimax",
    "mpt",
    "nemotron",
    "qwen3_5_text",
    "qwen3_next",
    "stablelm",
}
"""Those whose samples are not kept apart in one row: ALiBi, sinks, a state that runs on, code that is not replaced."""
if Version(transformers.__version__) < Version("5.24"):  # their attention could not be replaced before
    PADDED |= {"codegen", "gptj"}
PASSED_BY = {"falcon_h1": 2, "granitemoehybrid": 1, "mamba2": 2}
"""Number of linear layers that fused kernels of Mamba blocks read without calling them, and that so get no adapter."""
ROWS = [
    {"input_ids": list(range(5, 14)), "labels": [-100] * 4 + list(range(9, 14))},
    {"input_ids": list(range(40, 54)), "labels": [-100] * 6 + list(range(46, 54))},
]
IDS = torch.arange(3, 20)[None]


def build(name: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # as they start, some models' logits hardly depend on their layers
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.1)
    model.name_or_path = ""
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def plain_loss(model: Any) -> float:
    """Cross-entropy of the labeled tokens, each row on its own, through nothing but the model's logits."""
    total = 0.0
    for row in ROWS:
        with torch.no_grad():
            predicted = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(predicted, labels, ignore_index=-100, reduction="sum"))
    return total


def loss_of(model: Any, *, concatenates: bool) -> torch.Tensor:
    batch = concatenate_rows(ROWS) if concatenates else pad_rows(ROWS, 0)
    return next_token_loss(Models(model, inspect_head(model)), batch).total


def train(model: Any, *, concatenates: bool, steps: int = 3) -> None:
    """A few steps of the way that training takes. The loss of the batch before the first step is that of its rows."""
    prepare_for_training(model)
    assert float(loss_of(model.eval(), concatenates=concatenates)) == pytest.approx(plain_loss(model), rel=1e-4)
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, concatenates=concatenates)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


SOME = ("cohere2_moe", "deepseek_v3", "gpt2", "gpt_oss", "llama", "mamba2", "phi3", "qwen3_moe", "qwen3_next")
"""Dense and routed, fused and transposed projections, latent and linear attention, a model without attention."""


@pytest.mark.parametrize("name", representatives(ARCHITECTURES, *SOME))
def test_lora_on_all_layers_is_trained_saved_and_merged(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    concatenates = isolates_samples(model) is None
    assert concatenates == (name not in PADDED)
    adapted = ADAPTERS.get("lora").apply(model, LoraConfig(lora_rank=2), given=GivenAdapters(), pure_bf16=False)
    if concatenates:
        isolate_samples(adapted)
    train(adapted, concatenates=concatenates)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (expected - logits(base)).abs().max() > 1e-4
    num_adapted = sum("lora_A" in name for name, _ in adapted.named_parameters())
    assert num_adapted == num_targets(base) - PASSED_BY.get(name, 0)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_same(logits(plain), expected)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = merge_adapters(base, [str(tmp_path / "adapter")], GivenAdapters())
    assert_same(logits(merged), expected)
    write_model(tmp_path / "merged", merged, byte_tokenizer())
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)), expected)


def num_targets(model: Any) -> int:
    """Linear layers and stacked experts, the output head left aside."""
    head = model.get_output_embeddings()
    return sum(module is not head for _, module in linear_layers(model)) + len(list(expert_parameters(model)))


@pytest.mark.parametrize("name", representatives(ARCHITECTURES, *SOME))
def test_freeze_is_trained_and_saved(name, tmp_path):
    model = build(name)
    concatenates = name not in PADDED
    freeze = FreezeConfig(freeze_trainable_layers=1)
    ADAPTERS.get("freeze").apply(model, freeze, given=GivenAdapters(), pure_bf16=False)
    if concatenates:
        isolate_samples(model)
    train(model, concatenates=concatenates)
    expected = logits(model)
    write_model(tmp_path, model, byte_tokenizer())
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), expected)
