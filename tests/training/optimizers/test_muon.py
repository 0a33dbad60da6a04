"""Muon: hidden matrices step as torch.optim.Muon does, everything else as AdamW."""

import pytest
import torch
from transformers import get_scheduler

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.model.kernels import products
from luthier.training.optimizers.muon import is_hidden_matrix
from tests.training.optimizers.test_loraplus import RUN
from tests.training.optimizers.worlds import arguments, assert_resumes, built, fill_gradients, tiny_model, weights


def test_each_weight_steps_as_in_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(products, "has_half_kernel", lambda dtype: True)  # else its products are in float32
    model, by_hand = tiny_model(), tiny_model()
    optimizer = built("muon", model, arguments(tmp_path, weight_decay=0.1), use_muon=True)
    named = dict(by_hand.named_parameters())
    hidden = [name for name in named if name.startswith("model.layers") and "norm" not in name]
    muon = torch.optim.Muon([named[name] for name in hidden], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    norms = [weight for name, weight in named.items() if "norm" in name]
    outer = [named["model.embed_tokens.weight"], named["lm_head.weight"]]
    adamw = torch.optim.AdamW([{"params": outer, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=1e-2)
    for step in range(3):
        for each in (model, by_hand):
            fill_gradients(each, step)
        for each in (optimizer, muon, adamw):
            each.step()
    expected = weights(by_hand)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


def test_the_update_is_orthogonal(tmp_path):
    """Without decay a square matrix moves by 0.2 lr sqrt(n) times a matrix whose singular values are about 1."""
    model = tiny_model()
    before = weights(model)["model.layers.0.self_attn.o_proj.weight"]
    optimizer = built("muon", model, arguments(tmp_path), use_muon=True)
    fill_gradients(model, 0)
    optimizer.step()
    moved = before - weights(model)["model.layers.0.self_attn.o_proj.weight"]
    values = torch.linalg.svdvals(moved) / (0.2 * 1e-2 * 64**0.5)
    assert values.mean() == pytest.approx(1, abs=0.2) and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes(tmp_path, dtype):
    assert_resumes("muon", tmp_path, dtype=dtype, use_muon=True)


def test_a_schedule_reaches_every_part(tmp_path):
    optimizer = built("muon", tiny_model(), arguments(tmp_path), use_muon=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5e-2}


def test_a_schedule_reaches_every_part_of_a_resumed_run(tmp_path):
    """PyTorch has new groups after it has read a state."""
    optimizer, fresh = (built("muon", tiny_model(), arguments(tmp_path), use_muon=True) for _ in range(2))
    fresh.load_state_dict(optimizer.state_dict())
    for group in fresh.param_groups:
        group["lr"] = 0.25
    assert {group["lr"] for part in fresh.parts for group in part.param_groups} == {0.25}


def test_embeddings_of_other_names_are_not_hidden_matrices():
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    assert is_hidden_matrix("h.0.attn.c_attn.weight", matrix)
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert not is_hidden_matrix(name, matrix)


@pytest.mark.parametrize("switch", [{"use_muon": True}, {"use_galore": True, "galore_layerwise": True}])
@pytest.mark.parametrize(
    ("schedule", "more"), [("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 1e-3}), ("linear", {})]
)
def test_a_schedule_ends_at_its_share_of_the_rate(tmp_path, switch, schedule, more):
    """Some schedules of transformers ask the optimizer itself for the rate that it began with."""
    (name,) = [key.removeprefix("use_") for key in switch if key.startswith("use_")]
    args = arguments(tmp_path)
    optimizer = built(name, tiny_model(), args, **switch)
    schedule = get_scheduler(schedule, optimizer, 0, 4, more)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(more.get("min_lr", 0.0), abs=2e-7)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"optim": "adafactor"}, "optim: 'adafactor': does not go together with use_muon"),
        ({"use_adam_mini": True}, "use_adam_mini: true: another optimizer is switched on too"),
        ({"fsdp": "full_shard"}, "use_muon: true: needs whole weights, and fsdp gives each process a part"),
        ({"deepspeed": "ds.json"}, "use_muon: true: needs whole weights, and deepspeed gives each process a part"),
    ],
)
def test_incompatible_keys_are_refused(keys, text):
    with pytest.raises(ConfigError) as caught:
        load_train({**RUN, "use_muon": True, "finetuning_type": "full", **keys})
    assert text in str(caught.value)
