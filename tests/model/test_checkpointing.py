"""Checkpointing changes memory, not gradients, and stops where nothing below learns."""

import pytest
import torch

from luthier.model.checkpointing import enable_checkpointing
from luthier.model.load import load_model
from tests.tiny import tiny_llama

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def make(tmp_path):
    folder = str(tiny_llama(tmp_path, num_hidden_layers=4))
    return lambda: load_model(folder, dtype=torch.float32).train()


def gradients(model):
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def only(model, *words):
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(word in name for word in words))
    return model


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("words", [("",), ("layers.3",), ("layers.0",), ("q_proj",), ("embed_tokens",), ("lm_head",)])
def test_gradients_are_those_without_checkpointing(make, use_reentrant, words):
    expected = gradients(only(make(), *words))
    model = only(make(), *words)
    enable_checkpointing(model, use_reentrant=use_reentrant)
    found = gradients(model)
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_only_blocks_that_a_gradient_passes_are_computed_twice(make, use_reentrant):
    model = only(make(), "layers.2")
    enable_checkpointing(model, use_reentrant=use_reentrant)
    runs = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
    gradients(model)
    assert runs == [1, 1, 2, 2]
