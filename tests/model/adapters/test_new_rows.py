"""Which parts of a model an adapter trains for tokens that the model has never seen."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters, merge_adapters
from luthier.model.adapters._new_rows import add_rows, with_new_rows
from luthier.model.adapters.lora import LoraConfig
from luthier.model.adapters.oft import OftConfig
from luthier.model.embeddings import NewRows, NewTokens, num_rows
from luthier.model.save import save_adapter
from tests.model.adapters.test_lora import build, logits
from tests.tiny import TINY_LLAMA, byte_tokenizer

SINGLE, WHOLE = NewRows((261, 300)), NewRows((261,), is_whole=True)
ENDS = ["model.embed_tokens", "lm_head"]


def settings_with(rows: NewRows, *, tied: bool = False, kind=peft.LoraConfig, **settings):
    found = kind(**{"target_modules": ["q_proj"], **settings})
    add_rows(build(tie_word_embeddings=tied), found, rows, "lora_target")
    return found


def test_single_rows_are_those_of_both_ends_and_of_a_tied_matrix_once():
    assert settings_with(SINGLE).trainable_token_indices == {name: [261, 300] for name in ENDS}
    tied = settings_with(SINGLE, tied=True)
    assert tied.trainable_token_indices == {"model.embed_tokens": [261, 300]} and not tied.ensure_weight_tying


def test_nothing_new_changes_nothing():
    found = settings_with(NewRows(), modules_to_save=["norm"])
    assert found.modules_to_save == ["norm"] and found.trainable_token_indices is None


def test_what_grows_is_saved_in_full_beside_other_parts():
    assert settings_with(WHOLE, modules_to_save=["norm"]).modules_to_save == ["norm", "embed_tokens", "lm_head"]
    assert settings_with(WHOLE, tied=True).ensure_weight_tying


@pytest.mark.parametrize(("saved", "left"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_the_end_that_additional_target_leaves_out_is_trained_too(saved, left):
    found = settings_with(SINGLE, modules_to_save=[saved])
    assert found.modules_to_save == [saved] and list(found.trainable_token_indices) == [left]
    assert sorted(settings_with(WHOLE, modules_to_save=[saved]).modules_to_save) == ["embed_tokens", "lm_head"]
    tied = settings_with(SINGLE, tied=True, modules_to_save=[saved])
    assert tied.trainable_token_indices is None and tied.ensure_weight_tying


def test_oft_saves_whole_matrices():
    assert settings_with(SINGLE, kind=peft.OFTConfig).modules_to_save == ["embed_tokens", "lm_head"]


def test_a_head_with_a_bias_is_saved_in_full():
    """peft leaves out the bias where it trains single rows."""
    model = build()
    model.lm_head = torch.nn.Linear(64, 320)
    found = peft.LoraConfig(target_modules=["q_proj"])
    add_rows(model, found, SINGLE, "lora_target")
    assert found.modules_to_save == ["embed_tokens", "lm_head"] and found.trainable_token_indices is None


@pytest.mark.parametrize("target", [["q_proj", "lm_head"], ["model.embed_tokens"], r".*\.embed_tokens"])
def test_no_adapter_is_put_on_what_is_trained_itself(target):
    with pytest.raises(ModelError, match=r"lora_target: (embed_tokens|lm_head): .* -> leave .* out of lora_target"):
        settings_with(SINGLE, target_modules=target)
    with pytest.raises(ModelError, match="lora_target"):
        settings_with(NewRows(), tied=True, target_modules=target, modules_to_save=["embed_tokens"])


def test_an_adapter_on_the_embedding_gets_no_new_rows():
    adapted = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["embed_tokens"]))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a>"])
    with pytest.raises(ModelError, match=r"^adapter_name_or_path: embed_tokens: .* -> set create_new_adapter: true"):
        with_new_rows(adapted, NewTokens(tokenizer, ("<a>",)), pure_bf16=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [None, ["norm"], ["embed_tokens", "lm_head"]])
def test_an_adapter_that_gets_new_rows_computes_the_same_for_known_tokens(tied, saved):
    """Once for tokens that fit into spare rows, then for more than fit."""
    settings = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved, ensure_weight_tying=bool(saved)
    )
    adapted = peft.get_peft_model(build(tie_word_embeddings=tied), settings).eval()
    expected = logits(adapted)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a>"])
    adapted = with_new_rows(adapted, NewTokens(tokenizer, ("<a>",)), pure_bf16=False).eval()
    changed = (logits(adapted) != expected).any((0, 1)).nonzero().flatten().tolist()
    assert changed == [261]
    many = tuple(f"<{number}>" for number in range(70))
    tokenizer.add_tokens(list(many))
    row = adapted.get_input_embeddings().weight[261].clone()
    adapted = with_new_rows(adapted, NewTokens(tokenizer, many), pure_bf16=False).eval()
    assert num_rows(adapted.get_base_model()) == 384
    assert torch.equal(adapted.get_input_embeddings().weight[261], row)
    assert torch.equal(logits(adapted)[..., :261], expected[..., :261])
    assert adapted.peft_config["default"].trainable_token_indices is None


TABLES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "vocab_size_per_layer_input": 250,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 261, "global_head_dim": 8},
}
"""Models with a second embedding, which in the first one is shorter than the vocabulary."""


def with_table(name: str) -> Any:
    own = {"head_dim": 8, "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"]}
    sizes = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TINY_LLAMA, **sizes, **own, **TABLES[name], "tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # a scale of Gemma 3n is 0 at first, and its table has no effect
            weight.normal_(std=0.1) if weight.ndim > 1 else weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits


@pytest.mark.parametrize("method", ["lora", "oft", "lora, sharded"])
@pytest.mark.parametrize("name", TABLES)
def test_the_rows_that_a_second_embedding_gets_are_trained_and_saved(name, method, tmp_path):
    """Else each program that loads the adapter would have other numbers in them."""
    kind, config = ("oft", OftConfig(oft_block_size=4)) if method == "oft" else ("lora", LoraConfig(lora_rank=2))
    known, base = [*range(90, 120), 255, 260], with_table(name)
    before = logits_of(base, known)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    tokens = NewTokens(tokenizer, ("<a>", "<b>"), {"<a>": "ab"}, "desc_init", trains_single=method != "lora, sharded")
    adapted = ADAPTERS.get(kind).apply(base, config, given=GivenAdapters(), new_tokens=tokens, pure_bf16=False)
    torch.testing.assert_close(logits_of(adapted, known)[..., :261], before, atol=1e-5, rtol=0)
    is_single = method == "lora"
    saved = adapted.peft_config["default"]
    assert ("embed_tokens_per_layer" in saved.modules_to_save) != is_single
    if is_single:
        rows = range(TABLES[name]["vocab_size_per_layer_input"], 320)
        assert saved.trainable_token_indices == {"model.embed_tokens_per_layer": list(rows)}
    change(adapted)

    ids = [*known, 261, 262]
    assert_saved(adapted, name, ids, tmp_path / "one")
    tokenizer.add_tokens(many := [f"<{number}>" for number in range(70)])
    expected = logits_of(adapted, ids)
    again = with_new_rows(adapted, NewTokens(tokenizer, tuple(many)), pure_bf16=False)
    torch.testing.assert_close(logits_of(again, ids)[..., :263], expected[..., :263], atol=1e-5, rtol=0)
    change(again)
    assert_saved(again, name, [*ids, 270, 332], tmp_path / "two")


def change(adapted: Any) -> None:
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.02)


def assert_saved(adapted: Any, name: str, ids: list[int], folder: Path) -> None:
    expected = logits_of(adapted, ids)
    save_adapter(adapted, folder)
    plain = with_table(name)
    plain.resize_token_embeddings(num_rows(adapted), mean_resizing=False)
    plain = peft.PeftModel.from_pretrained(plain, str(folder))
    torch.testing.assert_close(logits_of(plain, ids), expected, atol=1e-5, rtol=0)
    merged = merge_adapters(with_table(name), [str(folder)], GivenAdapters())
    torch.testing.assert_close(logits_of(merged, ids), expected, atol=1e-5, rtol=0)
