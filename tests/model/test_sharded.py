"""Weights that FSDP 2 has sharded, here over a group of one process. Runs of two are in tests/runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from luthier.model.frozen_models import InitialPolicy
from luthier.model.heads.output_head import OutputHead
from luthier.model.sharded import exchange, gathered, param_groups, reshard, sharded_modules, whole_weights
from tests.tiny import tiny_llama

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def model(folder, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = AutoModelForCausalLM.from_pretrained(folder)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        yield model
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_nobody_has_sharded_stays_as_it_is(plain):
    assert sharded_modules(plain) == []
    before = dict(plain.named_parameters())
    with whole_weights(plain):
        assert all(before[name] is weight for name, weight in plain.named_parameters())
    assert not gathered(plain, keeps=False) and gathered(plain, keeps=True).keys() == plain.state_dict().keys()


def test_weights_are_whole_for_a_while(model, plain):
    model.train()
    with whole_weights(model):
        assert not model.training
        assert not any(isinstance(weight, DTensor) for weight in model.parameters())
        for _ in range(2):  # they stay, whatever runs
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
            assert not any(isinstance(weight, DTensor) for weight in model.parameters())
    assert model.training and all(isinstance(weight, DTensor) for weight in model.parameters())
    model(IDS)
    assert all(isinstance(weight, DTensor) for weight in model.model.layers.parameters()), "layers are freed again"


def test_the_groups_of_weights_are_found_in_every_version_of_pytorch():
    """A module with one group at most became one with a list of them."""
    group = object()
    assert param_groups(SimpleNamespace(_fsdp_param_groups=[group])) == [group]
    assert param_groups(SimpleNamespace(_fsdp_param_group=group)) == [group]
    assert param_groups(SimpleNamespace(_fsdp_param_group=None)) == []


def test_an_error_gives_the_shards_back(model):
    with pytest.raises(KeyError), whole_weights(model):
        raise KeyError
    assert all(isinstance(weight, DTensor) for weight in model.parameters())


def test_exchanged_weights_are_those_that_the_model_computes_with(model, plain):
    weight = dict(model.named_parameters())["lm_head.weight"]
    with torch.no_grad():
        model(IDS)
    before = exchange(weight, torch.zeros(weight.shape))
    reshard(model)
    with torch.no_grad():
        assert model(IDS).logits.abs().max() == 0
    reshard(model)
    exchange(dict(model.named_parameters())["lm_head.weight"], before)
    torch.testing.assert_close(gathered(model, keeps=True)["lm_head.weight"], plain.lm_head.weight.detach())


def test_trained_weights_alone_are_gathered(model):
    for name, weight in model.named_parameters():
        weight.requires_grad_(name == "model.norm.weight")
    found = gathered(model, keeps=True, only_trained=True)
    assert list(found) == ["model.norm.weight"] and type(found["model.norm.weight"]) is torch.Tensor


def test_the_initial_policy_answers_as_training_began(model, plain):
    initial = InitialPolicy(
        model, OutputHead(None, True), {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    )
    with torch.no_grad():
        expected = model(IDS).logits.clone()
        reshard(model)
        for weight in model.parameters():
            weight.mul_(1.5)
        changed = model(IDS).logits.clone()
    assert (changed - expected).abs().max() > 1e-3
    for _ in range(2):
        with initial.running() as policy:
            torch.testing.assert_close(policy(IDS).logits, expected)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, changed)
