"""Which parts of a model an adapter trains for tokens that the model has never seen."""

import peft
import pytest
import torch

from luthier.core.errors import ModelError
from luthier.model.adapters._new_rows import add_rows, with_new_rows
from luthier.model.embeddings import NewRows, NewTokens, num_rows
from tests.model.adapters.test_lora import build, logits
from tests.tiny import byte_tokenizer

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
