"""16-bit copies of adapters are those of the weights as they are, whatever has changed the weights meanwhile."""

import copy

import pytest
import torch

from luthier.model.kernels import lora_layers
from luthier.model.kernels.fuse import fuse
from luthier.model.kernels.lora_copies import Copies, learned_by
from tests.model.kernels.test_lora_layers import IDS, PROJECTIONS, lora, loss_and_grads

HALF = torch.bfloat16
NUM_LAYERS = 2


@pytest.fixture
def made(monkeypatch):
    """The formats that weights were turned into one group at a time."""
    formats = []
    own = lora_layers.factors_of
    monkeypatch.setattr(lora_layers, "factors_of", lambda *args: formats.append(args[-1]) or own(*args))
    return formats


def fused(**keys):
    model = lora(**keys)
    fuse(model)
    return model


def without_copies(monkeypatch, model, compute):
    with monkeypatch.context() as patch:
        patch.setattr(Copies, "_make", lambda self: None)
        return compute(copy.deepcopy(model))


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(grad, expected[1][name]) for name, grad in found[1].items())


@pytest.mark.parametrize("checkpoints", [None, True, False], ids=["kept", "reentrant", "not reentrant"])
@pytest.mark.parametrize("keys", [{}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"k_proj": 2}}, {"r": 3}])
def test_numbers_are_those_of_weights_turned_one_by_one(monkeypatch, made, keys, checkpoints):
    model = lora(**keys)
    if checkpoints is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    fuse(model)
    found = loss_and_grads(model, HALF)
    assert not made
    assert_equal(found, without_copies(monkeypatch, model, lambda model: loss_and_grads(model, HALF)))
    assert len(made) == NUM_LAYERS * 4 * (1 if checkpoints is None else 2)


@pytest.mark.parametrize("way", ["in place", "data", "another tensor"])
def test_the_next_pass_sees_weights_that_have_changed(monkeypatch, made, way):
    model = fused()
    loss_and_grads(model, HALF)
    for name, weight in model.named_parameters():
        if "lora_B" in name and way == "in place":
            with torch.no_grad():
                weight.mul_(2)
        elif "lora_B" in name and way == "data":
            weight.data.mul_(2)
        elif "lora_B" in name:
            weight.data = 2 * weight.data
    inner = model.base_model.model.model

    def states(model_):
        with torch.autocast("cpu", dtype=HALF):
            return model_(IDS).last_hidden_state

    again = copy.deepcopy(inner)
    assert torch.equal(states(inner), states(again)) and made  # outside of a pass of the whole model
    made.clear()
    found = loss_and_grads(model, HALF)
    assert not made
    assert_equal(found, without_copies(monkeypatch, model, lambda model: loss_and_grads(model, HALF)))


def test_blocks_that_are_computed_again_after_another_entrance_see_changed_weights(monkeypatch):
    """The whole model, an update that PyTorch does not count, and then the inner model alone, with its gradient."""
    model = lora()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    fuse(model)

    def compute(model):
        loss_and_grads(model, HALF)
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.data.mul_(1.5)
        model.zero_grad()
        with torch.autocast("cpu", dtype=HALF):
            loss = model.base_model.model.model(IDS).last_hidden_state.square().mean()
        loss.backward()
        return loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}

    assert_equal(compute(copy.deepcopy(model)), without_copies(monkeypatch, model, compute))


def test_adapters_of_several_formats(monkeypatch):
    model = lora()
    blocks = model.base_model.model.model.layers
    for layer in (blocks[0].self_attn.k_proj, blocks[1].mlp.down_proj):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    fuse(model)
    found = loss_and_grads(copy.deepcopy(model), HALF)
    assert_equal(found, without_copies(monkeypatch, model, lambda model: loss_and_grads(model, HALF)))


def test_one_layer_of_a_group_alone(monkeypatch):
    """Asked during a pass, by code that does not know that layers are computed together."""
    model = fused()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x, found = torch.randn(3, layer.in_features), []
    norm = model.base_model.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: found.append(layer(x)))

    def compute(model):
        with torch.autocast("cpu", dtype=HALF):
            model(IDS)
        return found[-1]

    alone = compute(model)
    monkeypatch.setattr(Copies, "_make", lambda self: None)
    assert torch.equal(alone, compute(model))


def test_two_passes_before_their_gradients(monkeypatch):
    def compute(model):
        with torch.autocast("cpu", dtype=HALF):
            losses = [model(ids, labels=ids).loss for ids in (IDS, IDS.flip(1))]
        sum(losses).backward()
        return losses[1].detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}

    model = fused()
    assert_equal(compute(copy.deepcopy(model)), without_copies(monkeypatch, model, compute))


def test_another_adapter_has_copies_of_its_own(made):
    model = fused()
    torch.manual_seed(1)
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    with torch.no_grad(), torch.autocast("cpu", dtype=HALF):
        first = model(IDS).logits
        model.set_adapter("other")
        assert not torch.equal(model(IDS).logits, first)
        model.set_adapter("default")
        assert torch.equal(model(IDS).logits, first)
        with model.disable_adapter():
            base = model(IDS).logits
    assert not made
    plain = lora()
    with torch.no_grad(), torch.autocast("cpu", dtype=HALF), plain.disable_adapter():
        torch.testing.assert_close(base, plain(IDS).logits, atol=0.05, rtol=0.05)


def test_blocks_are_computed_again_with_the_adapter_of_their_pass(monkeypatch):
    """A pass of another adapter comes between a pass and its gradient."""
    model = lora()
    torch.manual_seed(1)
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    fuse(model)

    def compute(model):
        with torch.autocast("cpu", dtype=HALF):
            loss = model(IDS, labels=IDS).loss
            with torch.no_grad(), model.disable_adapter():
                model(IDS)
            model.set_adapter("other")
            with torch.no_grad():
                model(IDS)
            model.set_adapter("default")
        loss.backward()
        return loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}

    assert_equal(compute(copy.deepcopy(model)), without_copies(monkeypatch, model, compute))


def test_a_pass_that_fails_ends():
    model = fused()
    copies = model.base_model.model.model.layers[0].mlp.up_proj.forward.copies
    with pytest.raises(IndexError):
        model(IDS + 10_000)
    assert copies.num_running == 0
    loss_and_grads(model, HALF)
    assert copies.num_running == 0 and copies.kept


def test_in_float32_there_are_none(made):
    model = fused()
    loss_and_grads(model)
    assert not model.base_model.model.model.layers[0].mlp.up_proj.forward.copies.kept
    assert len(made) == NUM_LAYERS * 4


def test_groups_are_found_and_called_together(monkeypatch):
    model = fused(target_modules=[name for name in PROJECTIONS if name != "gate_proj"])
    copies = model.base_model.model.model.layers[0].mlp.up_proj.forward.copies
    assert sorted(len(learned_by(group).a) for group in copies.groups) == [1] * 6 + [3] * NUM_LAYERS
    sizes, own = [], lora_layers.lora_linear
    monkeypatch.setattr(
        lora_layers, "lora_linear", lambda *args, **given: sizes.append(len(args[1])) or own(*args, **given)
    )
    loss_and_grads(model)
    assert sizes == [3, 1, 1, 1] * NUM_LAYERS


def test_a_layer_of_a_group_answers_for_another_input():
    model = fused()
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    x = torch.randn(2, 3, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + layer.scaling["default"] * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)
