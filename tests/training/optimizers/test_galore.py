"""GaLore: steps against the paper's algorithm written out, for each kind of projection."""

from typing import Any

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ConfigError, ModelError
from luthier.training.optimizers._low_rank import low_shape, project, project_back, sides_of, singular_vectors
from tests.training.optimizers.test_loraplus import RUN
from tests.training.optimizers.worlds import arguments, assert_resumes, built, fill_gradients, tiny_model, weights

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
"""Of shape (128, 64) and (64, 128)."""
PROJECTS: dict[str, dict[str, str]] = {
    "std": {UP: "right", DOWN: "left"},
    "reverse_std": {UP: "left", DOWN: "right"},
    "left": {UP: "left", DOWN: "left"},
    "right": {UP: "right", DOWN: "right"},
    "full": {UP: "both", DOWN: "both"},
}


def by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], side: str, *, rank: int, scale: float, decay: float):
    """W <- W (1 - lr decay) - lr scale P Adam(P^T G Q^T) Q, with P and Q recomputed at every second step."""
    eye_rows, eye_columns = torch.eye(weight.shape[0]), torch.eye(weight.shape[1])
    mean = square = torch.zeros(())
    for step, gradient in enumerate(gradients, start=1):
        if step % 2:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            p = left[:, :rank].contiguous() if side in ("left", "both") else eye_rows
            q = right[:rank].contiguous() if side in ("right", "both") else eye_columns
        low = p.T @ gradient @ q.T
        mean, square = 0.9 * mean + 0.1 * low, 0.999 * square + 0.001 * low**2
        adam = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight * (1 - 1e-2 * decay) - 1e-2 * scale * p @ adam @ q
    return weight


@pytest.mark.parametrize("proj_type", PROJECTS)
def test_three_steps_by_hand(tmp_path, proj_type):
    model, gradients = tiny_model(), {UP: [], DOWN: []}
    before = weights(model)
    keys = {"galore_rank": 4, "galore_update_interval": 2, "galore_scale": 0.25, "galore_proj_type": proj_type}
    optimizer = built("galore", model, arguments(tmp_path, weight_decay=0.1), use_galore=True, **keys)
    for step in range(3):
        fill_gradients(model, step)
        for name in gradients:
            gradients[name].append(model.get_parameter(name).grad.clone())
        optimizer.step()
    for name, side in PROJECTS[proj_type].items():
        expected = by_hand(before[name], gradients[name], side, rank=4, scale=0.25, decay=0.1)
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-5)


def test_unprojected_weights_step_as_in_adamw(tmp_path):
    model, plain = tiny_model(), tiny_model()
    optimizer = built("galore", model, arguments(tmp_path), use_galore=True, galore_target=("mlp",))
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    for step in range(2):
        for each in (model, plain):
            fill_gradients(each, step)
        optimizer.step(), adamw.step()
    for name, weight in weights(model).items():
        assert torch.equal(weight, plain.get_parameter(name)) != (".mlp." in name), name


def test_the_moments_are_small(tmp_path):
    model = tiny_model()
    optimizer = built("galore", model, arguments(tmp_path), use_galore=True, galore_rank=4)
    fill_gradients(model, 0)
    optimizer.step()
    projected = {tuple(w.shape) for g in optimizer.inner.param_groups for w in g["params"]}
    # q and o; k and v; up and gate; down; the two vocabularies; norms.
    assert projected == {(64, 4), (4, 64), (128, 4), (4, 128), (320, 64), (64,)}


def test_a_name_that_no_module_has_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"galore_target: no module of this model is called 'mpl'"):
        built("galore", tiny_model(), arguments(tmp_path), use_galore=True, galore_target=("mpl",))


LAYERWISE = {"galore_layerwise": True, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    ("dtype", "optim"), [(torch.float32, "adafactor"), (torch.bfloat16, "adafactor"), (torch.bfloat16, "adamw_torch")]
)
def test_it_resumes(tmp_path, dtype, optim, layerwise):
    keys = {"galore_rank": 4, "galore_update_interval": 3, "galore_layerwise": layerwise, "use_galore": True}
    assert_resumes("galore", tmp_path, dtype=dtype, args=arguments(tmp_path, optim=optim, weight_decay=0.1), **keys)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_schedule_reaches_the_optimizer_of_the_proxies(tmp_path, layerwise):
    """The first step of Adam moves each weight in proportion to the rate."""
    moved, ids = [], torch.arange(48).view(2, 24)
    for rate in (1e-2, 1e-3):
        model = tiny_model()
        before = weights(model)
        keys = {"use_galore": True, "galore_rank": 4, "galore_layerwise": layerwise}
        optimizer = built("galore", model, arguments(tmp_path), **keys)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        moved.append({name: (weight - before[name]).norm().item() for name, weight in weights(model).items()})
    for name, far in moved[0].items():
        assert far > 0 and moved[1][name] == pytest.approx(far / 10, rel=1e-3), name


def test_a_rank_above_the_size_of_a_weight_is_that_size():
    gradient = torch.randn(3, 5, dtype=torch.float64)
    for proj_type in ("std", "reverse_std", "left", "right", "full"):
        sides = sides_of(gradient.shape, proj_type)
        vectors = singular_vectors(gradient, 9, sides)
        low = project(gradient, *vectors)
        assert low.shape == low_shape(gradient.shape, 9, sides)
        torch.testing.assert_close(project_back(low, *vectors), gradient, atol=1e-5, rtol=0)


def test_layerwise_steps_give_the_same_and_free_gradients(tmp_path):
    """Through a real backward pass, with no bound on the norm of the gradient."""
    together, apart = tiny_model(), tiny_model()
    ids = torch.arange(48).view(2, 24)
    args = arguments(tmp_path, weight_decay=0.1)
    keys: dict[str, Any] = {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2}
    first, second = built("galore", together, args, **keys), built("galore", apart, args, **keys, galore_layerwise=True)
    for _ in range(3):
        for model, optimizer in ((together, first), (apart, second)):
            model(input_ids=ids, labels=ids).loss.backward()
            assert (model is apart) == all(weight.grad is None for weight in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    expected = weights(together)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(apart).items())


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"finetuning_type": "lora"}, "use_galore: true: is for training the weights of the model itself"),
        ({"optim": "sgd"}, "optim: 'sgd': does not go together with use_galore, which needs one of adamw_torch"),
        ({"use_apollo": True}, "use_apollo: true: another optimizer is switched on too"),
        ({"use_badam": True}, "use_galore: true: another optimizer is switched on too"),
        ({"deepspeed": "ds.json"}, "use_galore: true: needs whole weights, and deepspeed"),
        ({"galore_rank": 0}, "galore_rank: 0: must be at least 1"),
        ({"galore_update_interval": 0}, "galore_update_interval: 0: must be at least 1"),
        (
            {"galore_layerwise": True, "gradient_accumulation_steps": 2},
            "galore_layerwise: true: applies each gradient as soon as it is computed",
        ),
        ({"galore_layerwise": True, "fp16": True}, "galore_layerwise: true: applies gradients before"),
    ],
)
def test_incompatible_keys_are_refused(keys, text):
    with pytest.raises(ConfigError) as caught:
        load_train({**RUN, "use_galore": True, "finetuning_type": "full", **keys})
    assert text in str(caught.value)


def test_processes_exchange_gradients_too_late_for_layerwise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_train({**RUN, "use_galore": True, "finetuning_type": "full"})
    with pytest.raises(ConfigError, match="galore_layerwise: true: applies each gradient before the processes"):
        load_train({**RUN, "use_galore": True, "finetuning_type": "full", "galore_layerwise": True})


def test_warnings():
    keys = {"use_galore": True, "galore_layerwise": True, "finetuning_type": "full", "max_grad_norm": 0.5}
    texts = [str(warning) for warning in load_train({**RUN, **keys}).warnings]
    assert any("use_galore: true: saves memory of the optimizer, and without pure_bf16" in text for text in texts)
    assert any("max_grad_norm: 0.5: has no effect: with galore_layerwise" in text for text in texts)
    assert not load_train({**RUN, **keys, "max_grad_norm": 1.0, "pure_bf16": True}).warnings
