"""APOLLO: steps against the paper's algorithm written out, with projections that are known."""

from typing import Any

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.training.optimizers._low_rank import random_vectors
from tests.training.optimizers.test_galore import DOWN, UP
from tests.training.optimizers.test_loraplus import RUN
from tests.training.optimizers.worlds import arguments, assert_resumes, built, fill_gradients, tiny_model, weights


def by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], projections: list[torch.Tensor], keys: dict[str, Any]):
    """For a weight with at least as many columns as rows; `projections`: the P (m, r) of each step."""
    mean = square = torch.zeros(())
    longest = None
    for step, (gradient, p) in enumerate(zip(gradients, projections, strict=True), start=1):
        low = p.T @ gradient
        mean, square = 0.8 * mean + 0.2 * low, 0.95 * square + 0.05 * low**2
        adam = mean / (1 - 0.8**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        if keys["apollo_scale_type"] == "channel":
            factors = torch.stack([adam[:, j].norm() / low[:, j].norm() for j in range(low.shape[1])])
        else:
            factors = adam.norm() / low.norm()
        update = gradient * factors * 4.0  # the root of the scale
        if longest is not None and update.norm() > 1.01 * longest:
            update = update * 1.01 * longest / update.norm()
        longest = update.norm()
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * update
    return weight


@pytest.mark.parametrize("scales_first", [False, True])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("proj", ["svd", "random"])
def test_three_steps_by_hand(tmp_path, proj, scale_type, scales_first):
    keys = {"apollo_rank": 4, "apollo_update_interval": 2, "apollo_scale": 16.0, "apollo_proj": proj}
    keys |= {"apollo_scale_type": scale_type, "apollo_scale_front": scales_first, "use_apollo": True}
    model = tiny_model()
    before = weights(model)
    optimizer = built("apollo", model, arguments(tmp_path, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95), **keys)
    gradients: dict[str, list[torch.Tensor]] = {UP: [], DOWN: []}
    projections: dict[str, list[torch.Tensor]] = {UP: [], DOWN: []}
    for step in range(3):
        fill_gradients(model, step)
        for name in gradients:
            model.get_parameter(name).grad *= 1 + step  # so that the limit of the growth acts
            gradients[name].append(model.get_parameter(name).grad.clone())
        optimizer.step()
        for name in gradients:
            state = optimizer.state[model.get_parameter(name)]
            projections[name].append(state["left"] if name == DOWN else state["right"].T)
    for name in gradients:
        turn = (lambda x: x) if name == DOWN else (lambda x: x.T)
        expected = turn(by_hand(turn(before[name]), [turn(g) for g in gradients[name]], projections[name], keys))
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-5)
        assert torch.equal(projections[name][0], projections[name][1])
        assert not torch.equal(projections[name][1], projections[name][2])


def test_an_update_that_was_limited_limits_the_next_one(tmp_path):
    """Gradients g, -g, g, g: the mean is near 0 after the second step and would then be far larger."""
    model = tiny_model()
    optimizer = built("apollo", model, arguments(tmp_path), use_apollo=True, apollo_rank=4)
    fill_gradients(model, 0)
    weight, lengths = model.get_parameter(UP), []
    for sign in (1, -1, -1, 1):  # times what it is already
        weight.grad *= sign
        before = weight.detach().clone()
        optimizer.step()
        lengths.append((weight - before).norm().item())
    assert lengths[1] < lengths[0] / 2
    assert lengths[2:] == pytest.approx([1.01 * lengths[1], 1.01**2 * lengths[1]], rel=1e-3)


def test_random_projections_keep_lengths_on_average_and_differ_between_weights(tmp_path):
    gradient = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    left, right = random_vectors(gradient, 64, (True, False), seed=1)
    assert right is None and (left.T @ gradient).norm().item() == pytest.approx(gradient.norm().item(), rel=0.1)
    model = tiny_model()
    optimizer = built("apollo", model, arguments(tmp_path), use_apollo=True, apollo_rank=4)
    fill_gradients(model, 0)
    optimizer.step()
    first, second = (optimizer.state[model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight")] for i in (0, 1))
    assert not torch.equal(first["right"], second["right"])


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes(tmp_path, dtype, layerwise):
    keys = {"apollo_rank": 4, "apollo_update_interval": 3, "apollo_layerwise": layerwise, "use_apollo": True}
    assert_resumes("apollo", tmp_path, dtype=dtype, **keys)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"finetuning_type": "lora"}, "use_apollo: true: is for training the weights of the model itself"),
        ({"optim": "adafactor"}, "optim: 'adafactor': does not go together with use_apollo"),
        ({"deepspeed": "ds.json"}, "use_apollo: true: needs whole weights, and deepspeed"),
        ({"apollo_rank": 0}, "apollo_rank: 0: must be at least 1"),
        ({"apollo_scale": -1}, "apollo_scale: -1: must be at least 0"),
        (
            {"apollo_layerwise": True, "gradient_accumulation_steps": 2},
            "apollo_layerwise: true: applies each gradient as soon as it is computed",
        ),
    ],
)
def test_incompatible_keys_are_refused(keys, text):
    with pytest.raises(ConfigError) as caught:
        load_train({**RUN, "use_apollo": True, "finetuning_type": "full", **keys})
    assert text in str(caught.value)


def test_processes_exchange_gradients_too_late_for_layerwise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="apollo_layerwise: true: applies each gradient before the processes"):
        load_train({**RUN, "use_apollo": True, "finetuning_type": "full", "apollo_layerwise": True})
