"""The numbers of the merge check, worked out by hand, and the models they are taken from."""

import math

import pytest
import torch

from luthier.model.adapters._merge_check import Reference, agreement, next_token_logits
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model


def test_divergence_and_first_choice_by_hand():
    """p = (1/2, 1/2) and q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3; at the other position p = q."""
    before = [torch.tensor([[0.0, 0.0], [math.log(9), 0.0]])]
    after = [torch.tensor([[0.0, math.log(3)], [math.log(9) + 5, 5.0]])]
    found = agreement(before, after)
    assert found.mean_kl == pytest.approx(math.log(4 / 3) / 4, abs=1e-7)
    assert found.largest_kl == pytest.approx(math.log(4 / 3) / 2, abs=1e-7)
    assert found.top1_agreement == 0.5  # argmax of equal numbers is the first
    assert found.num_positions == 2
    assert str(found) == "mean KL 0.072 nats, the same first choice at 50.0% of 2 positions"


def test_columns_of_tokens_added_since_do_not_count():
    before, after = [torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 2.0, 9.0]])]
    assert agreement(before, after).mean_kl == pytest.approx(0, abs=1e-12)


def test_what_is_not_a_number_is_no_agreement():
    assert math.isnan(agreement([torch.zeros(1, 2)], [torch.tensor([[math.nan, 0.0]])]).mean_kl)


def test_logits_are_those_of_the_model_and_ids_without_a_row_are_left_out(llama_folder):
    model = load_model(ModelSource(str(llama_folder)), dtype=torch.bfloat16).train()
    (found,) = next_token_logits(model, [[65, 66, 100_000, 67]])
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[65, 66, 67]])).logits[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


def test_each_adapter_is_compared_with_what_the_next_one_stands_on(llama_folder):
    """The second adapter stands on a model from which the first is missing, and this shows."""
    from peft import LoraConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))

    for merge in (True, False):
        reference = Reference([[65, 66, 67]])
        first = adapted(load_model(ModelSource(str(llama_folder)), dtype=torch.float32))
        reference(first)
        reference(adapted(first.merge_and_unload() if merge else first.unload()))
        (step,) = reference.merges
        assert (step.mean_kl < 1e-9) is merge


def test_a_model_with_encoder_and_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    (logits,) = next_token_logits(T5ForConditionalGeneration(config), [[1, 2, 3]])
    assert logits.shape == (3, 64)
