"""The plan of a run with one of Luthier's own optimizers counts the tensors that the real optimizer holds.

A run trains two steps, the second of which has all states. What it holds is found by a walk through the optimizer.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import luthier
from luthier.core.errors import InvalidInput
from luthier.core.kinds import OPTIMIZERS
from luthier.training.optimizers.badam import BadamConfig
from luthier.training.optimizers.badam import phases as badam_phases
from luthier.training.trainer import StageTrainer
from luthier.workflow.plan.engine import Engine
from luthier.workflow.plan.make import make_plan
from luthier.workflow.plan.shape import Unplanned
from tests.matrix import representatives
from tests.plans import plan_of, sides
from tests.small_world import small_world
from tests.training.optimizers.worlds import arguments, tiny_model

PURE = {"pure_bf16": True}
RUNS: dict[str, dict[str, Any]] = {
    "muon": {"use_muon": True},
    "muon, 16 bits": {"use_muon": True, **PURE},
    "muon, lora": {"use_muon": True, "finetuning_type": "lora"},
    "adam_mini": {"use_adam_mini": True},
    "adam_mini, 16 bits": {"use_adam_mini": True, **PURE},
    "adam_mini, lora": {"use_adam_mini": True, "finetuning_type": "lora"},
    "galore": {"use_galore": True, "galore_rank": 4},
    "galore, both sides": {"use_galore": True, "galore_rank": 4, "galore_proj_type": "full"},
    "galore, rank above the weights": {"use_galore": True, "galore_rank": 1000},
    "galore, some layers": {"use_galore": True, "galore_rank": 4, "galore_target": "mlp"},
    "galore, 16 bits": {"use_galore": True, "galore_rank": 4, **PURE},
    "galore, layerwise": {"use_galore": True, "galore_rank": 4, "galore_layerwise": True},
    "galore, adafactor": {"use_galore": True, "galore_rank": 4, "optim": "adafactor"},
    "galore, adafactor, 16 bits": {"use_galore": True, "galore_rank": 4, "optim": "adafactor", **PURE},
    "galore, frozen layers": {"use_galore": True, "galore_rank": 4, "finetuning_type": "freeze"},
    "apollo": {"use_apollo": True, "apollo_rank": 4},
    "apollo, of a matrix": {"use_apollo": True, "apollo_rank": 1, "apollo_scale_type": "tensor"},
    "apollo, svd": {"use_apollo": True, "apollo_rank": 4, "apollo_proj": "svd", "apollo_proj_type": "right"},
    "apollo, 16 bits": {"use_apollo": True, "apollo_rank": 4, **PURE},
    "apollo, layerwise": {"use_apollo": True, "apollo_rank": 4, "apollo_layerwise": True},
    "badam": {"use_badam": True},
    "badam, 16 bits": {"use_badam": True, **PURE},
    "badam, the last layer": {"use_badam": True, "badam_switch_mode": "descending"},
    "badam, adafactor": {"use_badam": True, "optim": "adafactor", **PURE},
    "badam, ratio": {"use_badam": True, "badam_mode": "ratio"},
    "badam, ratio, scattered": {"use_badam": True, "badam_mode": "ratio", "badam_mask_mode": "scatter", **PURE},
}
FAST = ("muon", "adam_mini", "galore", "galore, layerwise", "apollo", "badam")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=6)
    return {**values, "max_steps": 2}


class Found:
    optimizer: Any
    gradients = 0
    """The most that are there at the same time."""


@pytest.fixture
def found(monkeypatch) -> Found:
    noted, build = Found(), StageTrainer.create_optimizer

    def create_optimizer(self: Any, model: Any = None) -> Any:
        def note(_: torch.Tensor) -> None:
            there = {id(grad): grad.nbytes for w in self.policy.parameters() if (grad := w.grad) is not None}
            noted.gradients = max(noted.gradients, sum(there.values()))

        for weight in self.policy.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(note)
        noted.optimizer = build(self, model)
        return noted.optimizer

    monkeypatch.setattr(StageTrainer, "create_optimizer", create_optimizer)
    return noted


def tensors_of(part: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All that an object and what it is made of hold, without functions."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from tensors_of(key, seen)
            yield from tensors_of(value, seen)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from tensors_of(value, seen)
    elif isinstance(part, torch.optim.Optimizer):
        yield from tensors_of(vars(part), seen)


@pytest.mark.parametrize("name", representatives(RUNS, *FAST))
def test_planned_bytes_are_those_of_the_tensors_that_the_optimizer_holds(world, found, tmp_path, name):
    values = {**world, **RUNS[name], "output_dir": str(tmp_path / "out")}
    held = plan_of(values).held
    result = luthier.train(values)
    assert result.metrics["train"]["train_loss"] > 0
    optimizer = found.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_of(optimizer, set())
        if id(tensor) not in weights
    }
    assert held.optimizer_bytes == sum(storages.values())
    assert held.gradients_bytes == found.gradients


def test_only_the_lowest_the_highest_and_the_largest_layer_stand_for_all(tmp_path):
    """Of layers 0 to 3, for 50 steps each, the mean is 1.5: half of layer 0 and half of layer 3."""
    model, args = tiny_model(num_hidden_layers=4), arguments(tmp_path)

    def found(num_steps: int, **keys: Any) -> dict[int, float]:
        given = BadamConfig(use_badam=True, **keys)
        return {phase.config.badam_start_block: phase.share for phase in badam_phases(model, args, given, num_steps)}

    assert found(200) == {0: 0.5, 3: 0.5}
    assert found(60) == {0: 50 / 60, 1: 10 / 60}
    assert found(200, badam_switch_interval=-1, badam_start_block=2) == {2: 1.0}
    assert found(100, badam_switch_mode="descending") == {2: 0.5, 3: 0.5}
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(1000, 64))
    assert found(200) == {0: 0.5, 3: 0.5, 1: 0.0}


def test_new_projections_are_counted_in_the_steps_that_have_them(world):
    """Of 4 steps with an interval of 3, the first and the fourth."""
    keys = {**world, "use_galore": True, "galore_rank": 4, "max_steps": 4, "galore_update_interval": 3}
    optimizer = OPTIMIZERS.get("galore")
    run, _, _, _, _ = sides(keys)
    config = run.optimizers["galore"]
    renewing, others = optimizer.phases(tiny_model(), None, config, 4)
    assert (renewing.share, others.share) == (0.5, 0.5) and renewing.config.galore_update_interval == 1
    assert others.config.galore_update_interval > 4
    always = plan_of({**keys, "galore_update_interval": 1})
    assert replace(always.held, libraries_bytes=0) == replace(plan_of(keys).held, libraries_bytes=0)
    assert always.held.updating_bytes > 0


def test_what_steps_in_the_backward_pass_never_has_all_gradients(world):
    keys = {**world, "use_galore": True, "galore_rank": 4, "disable_gradient_checkpointing": True}
    whole, layerwise = plan_of(keys), plan_of({**keys, "galore_layerwise": True})
    assert layerwise.held.gradients_bytes < whole.held.gradients_bytes / 4
    assert layerwise.trace.late_bytes < whole.trace.late_bytes
    assert layerwise.trace.num_operations == whole.trace.num_operations, "updates are counted on their own"


def test_a_layer_that_trains_alone_takes_the_less_the_higher_it_is(world):
    keys = {**world, "use_badam": True, "badam_switch_mode": "fixed", "disable_gradient_checkpointing": True}
    low, high = (plan_of({**keys, "badam_start_block": number}) for number in (0, 5))
    whole = plan_of({**world, "disable_gradient_checkpointing": True})
    assert high.trace.early_bytes < low.trace.early_bytes < whole.trace.early_bytes
    assert high.trace.num_operations < low.trace.num_operations < whole.trace.num_operations
    assert high.held.optimizer_bytes == low.held.optimizer_bytes < whole.held.optimizer_bytes / 5


@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2", "tp"])
def test_engines_that_split_weights_are_refused_by_name(world, engine):
    given = sides({**world, "use_muon": True})
    with pytest.raises(Unplanned, match=f"use_muon needs whole weights, and {engine}"):
        make_plan(*given, engine=Engine(engine, 2))


def test_a_layer_that_is_not_there_is_told_by_its_key(world):
    with pytest.raises(InvalidInput, match="badam_start_block: 9"):
        plan_of({**world, "use_badam": True, "badam_start_block": 9})


WHAT_IF = {
    "full": {},
    "muon": {"use_muon": True},
    "galore, layerwise": {"use_galore": True, "galore_rank": 4, "galore_layerwise": True},
    "apollo, 16 bits": {"use_apollo": True, "apollo_rank": 4, **PURE},
    "badam": {"use_badam": True},
    "lora": {"finetuning_type": "lora"},
}


@pytest.mark.parametrize("name", representatives(WHAT_IF, "galore, layerwise", "lora"))
def test_what_would_help_is_what_the_plan_with_these_keys_says(world, name):
    """The libraries are left out, since they are far larger than this model."""
    keys = {**world, **WHAT_IF[name], "per_device_train_batch_size": 6, "disable_gradient_checkpointing": True}
    plan = plan_of(keys)

    def own_bytes(plan: Any, peak_bytes: int) -> float:
        return peak_bytes / (1 + plan.held.margin_share) - plan.held.libraries_bytes

    remedies = {remedy.keys: own_bytes(plan, remedy.peak_bytes) for remedy in plan.what_if}
    smaller = [text for text in remedies if text.startswith("per_device_train_batch_size: 1")]
    assert smaller and ("gradient_accumulation_steps" in smaller[0]) == (name != "galore, layerwise")
    assert "bf16: true" in remedies or name != "lora"
    for text in remedies.keys() & {"bf16: true", *smaller}:
        changes = dict(part.split(": ") for part in text.split(", "))
        changed = plan_of({**keys, **{key: True if value == "true" else int(value) for key, value in changes.items()}})
        within = 1e-6 if text == "bf16: true" else 0.15
        assert remedies[text] == pytest.approx(own_bytes(changed, changed.peak_bytes), rel=within), text
