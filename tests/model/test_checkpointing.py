"""Checkpointing changes memory, not gradients, and stops where nothing below learns."""

import pytest
import torch
from transformers import Llama4VisionConfig, Llama4VisionModel

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from tests.media_models import VISION
from tests.tiny import tiny_llama

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def make(tmp_path):
    folder = str(tiny_llama(tmp_path, num_hidden_layers=4))
    return lambda: load_model(ModelSource(folder), dtype=torch.float32).train()


def gradients(model):
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def only(model, *words):
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(word in name for word in words))
    return model


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "offloaded": {"use_reentrant": False, "offload": True},
    "every second": {"use_reentrant": True, "checkpoint_every": 2},
    "the first two": {"use_reentrant": True, "num_layers": 2},
    "every third, offloaded": {"use_reentrant": True, "checkpoint_every": 3, "offload": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("words", [("",), ("layers.3",), ("layers.0",), ("q_proj",), ("embed_tokens",), ("lm_head",)])
def test_gradients_are_those_without_checkpointing(make, way, words):
    expected = gradients(only(make(), *words))
    model = only(make(), *words)
    enable_checkpointing(model, **WAYS[way])
    found = gradients(model)
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("freezes_later", [False, True])
def test_only_blocks_that_a_gradient_passes_are_computed_twice(make, use_reentrant, freezes_later):
    """Also of weights that are frozen later, as BAdam does in turn."""
    model = make() if freezes_later else only(make(), "layers.2")
    enable_checkpointing(model, use_reentrant=use_reentrant)
    only(model, "layers.2")
    runs = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
    gradients(model)
    assert runs == [1, 1, 2, 2]


def test_one_block_of_several_is_computed_twice(make):
    model = make()
    enable_checkpointing(model, use_reentrant=True, checkpoint_every=2)
    runs = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
    gradients(model)
    assert runs == [2, 1, 2, 1]


def test_the_first_blocks_are_computed_twice(make):
    model = make()
    enable_checkpointing(model, use_reentrant=True, num_layers=3)
    runs = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
    gradients(model)
    assert runs == [2, 2, 2, 1]


def test_of_an_offloaded_block_only_the_input_is_kept(make):
    """What goes through `offloaded` are the hidden states, (1, T, H) once per block; the rest is computed again."""
    model, kept = make(), []
    enable_checkpointing(model, use_reentrant=True, offload=True)
    inner = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t)
    with inner:
        model.model(input_ids=IDS, use_cache=False)
    assert kept.count((1, IDS.shape[1], 64)) <= 4


@pytest.mark.parametrize("offload", [False, True])
def test_hidden_states_that_are_given_by_name(offload):
    """As the tower of Llama 4 gives them to its layers."""
    sizes = {"intermediate_size": 128, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    torch.manual_seed(0)
    tower = Llama4VisionModel(Llama4VisionConfig(**{**VISION, **sizes})).train()
    expected = None
    for checkpoints in (False, True):
        if checkpoints:
            enable_checkpointing(tower, use_reentrant=True, offload=offload)
        tower.zero_grad()
        tower(torch.ones(1, 3, 28, 28)).last_hidden_state.square().sum().backward()
        found = {name: weight.grad.clone() for name, weight in tower.named_parameters() if weight.grad is not None}
        expected = expected or found
    assert found.keys() == expected.keys() and any("layers.0" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"use_unsloth_gc": True, "disable_gradient_checkpointing": True}, "recomputes none -> set one"),
        ({"checkpoint_every": 2, "disable_gradient_checkpointing": True}, "recomputes none -> set one"),
        ({"checkpoint_every": 0}, "must be at least 1"),
        ({"use_unsloth_gc": True, "fsdp": "full_shard"}, "which FSDP cannot follow"),
        ({"use_unsloth_gc": True, "moe_aux_loss_coef": 0.1}, "the routers of experts get no gradient"),
    ],
)
def test_what_does_not_go_together_is_refused(keys, match):
    with pytest.raises(ConfigError, match=match):
        load_train({"model_name_or_path": "x", "dataset": "x", "output_dir": "x", **keys})
