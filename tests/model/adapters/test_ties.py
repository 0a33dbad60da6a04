"""An adapter on one use of a tied matrix changes that use, merged as well as beside the weights."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.model.adapters._merge import GivenAdapters, merge_adapters
from luthier.model.adapters._ties import settle_ties, untie_adapted
from tests.model.adapters.test_lora import IDS, build


def adapted_on(*targets: str, **settings) -> peft.PeftModel:
    """A tied model with an adapter that changes something."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, **settings)
    return peft.get_peft_model(build(tie_word_embeddings=True), config).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (("embed_tokens",), {}),
        (("lm_head", "q_proj"), {}),
        (("embed_tokens", "lm_head"), {}),
        (("embed_tokens",), {"ensure_weight_tying": True}),
        (("embed_tokens", "lm_head"), {"ensure_weight_tying": True}),
    ],
)
def test_the_merged_model_computes_what_the_adapter_did_and_so_does_its_file(tmp_path, targets, settings):
    adapted = adapted_on(*targets, **settings)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = merge_adapters(build(tie_word_embeddings=True), [str(tmp_path / "adapter")], GivenAdapters())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5 * max(1, expected.abs().max()), rtol=0)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))


def test_an_adapter_elsewhere_leaves_the_tie():
    adapted = adapted_on("q_proj")
    untie_adapted(adapted)
    merged = adapted.merge_and_unload()
    settle_ties(merged)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_model_without_a_tie_stays_as_it_is():
    model = build()
    before = model.lm_head.weight
    settle_ties(model)
    assert model.lm_head.weight is before and not model.config.tie_word_embeddings


def test_before_a_merge_each_end_has_its_own_matrix_and_the_config_says_so():
    """PiSSA takes a part out of one end before training, with no merge after which it would be settled."""
    adapted = adapted_on("embed_tokens")
    untie_adapted(adapted)
    base = adapted.get_base_model()
    assert not base.config.tie_word_embeddings
    assert not base.all_tied_weights_keys
    assert base.lm_head.weight.data_ptr() != base.model.embed_tokens.base_layer.weight.data_ptr()
    assert torch.equal(base.lm_head.weight, base.model.embed_tokens.base_layer.weight)


def test_an_adapter_that_brings_a_matrix_for_one_end_unties_the_merged_model(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(build(tie_word_embeddings=True), config).eval()
    with torch.no_grad():
        adapted.get_base_model().lm_head.modules_to_save["default"].weight += 0.1
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = merge_adapters(build(tie_word_embeddings=True), [str(tmp_path / "adapter")], GivenAdapters())
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected)
