"""Dropout is found and switched off wherever a model keeps a rate."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from luthier.model.dropout import has_dropout, switch_dropout_off
from tests.tiny import TINY_LLAMA


def gpt2():
    """Its layers have dropout by default."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def attention():
    """A rate that the attention function is called with."""
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, attention_dropout=0.5))


def lora():
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)), LoraConfig(lora_dropout=0.5, r=2))


@pytest.mark.parametrize("build", [gpt2, attention, lora])
def test_a_model_without_dropout_computes_the_same_again_while_training(build):
    model, ids = build().train(), torch.arange(20)[None]
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    assert has_dropout(model) and not torch.equal(model(ids).logits, model(ids).logits)
    switch_dropout_off(model)
    assert not has_dropout(model) and torch.equal(model(ids).logits, model(ids).logits)


def test_a_model_that_has_none():
    assert not has_dropout(LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)))
