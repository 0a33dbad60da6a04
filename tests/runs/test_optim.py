"""Every `optim` and `lr_scheduler_type` acts, or is refused in one sentence before weights are loaded."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import luthier
from luthier.config.load import load_train
from luthier.config.rules.optim import LIBRARIES, NEEDS_ACCELERATOR, SETTINGS
from luthier.core.errors import ConfigError, InvalidInput
from luthier.core.versions import is_installed
from tests.matrix import representatives
from tests.small_world import losses, small_world

OPTIMS = [name.value for name in OptimizerNames]
SOME = ("adamw_torch", "adafactor", "adamw_bnb_8bit", "galore_adamw", "lomo", "schedule_free_radam", "sgd")
SCHEDULES = [name.value for name in SchedulerType]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 1, "lr_scheduler_type": "constant"}


def library_of(optim: str) -> str | None:
    return next((module for module, (values, _) in LIBRARIES.items() if optim in values), None)


@pytest.mark.parametrize("optim", representatives(OPTIMS, *SOME))
def test_one_step_or_one_sentence(values, optim):
    targets = {"optim_target_modules": "all-linear"} if optim.startswith(("galore", "apollo")) else {}
    values = {**values, **targets, "optim": optim}
    module = library_of(optim)
    if module is not None and not is_installed(module):
        with pytest.raises(
            ConfigError, match=f"optim: '{optim}': needs the library {module}, which is not installed ->"
        ):
            luthier.train({**values, "model_name_or_path": "no/weights-are-asked-for"})
        return
    if optim == "galore_adafactor_layerwise":
        with pytest.raises(ConfigError, match="cannot be built by this version of transformers -> set use_galore"):
            luthier.train(values)
        return
    if optim in NEEDS_ACCELERATOR and not torch.cuda.is_available():
        with pytest.raises(InvalidInput, match=f"optim: {optim}: its library needs an accelerator"):
            luthier.train({**values, "model_name_or_path": "no/weights-are-asked-for"})
        return
    # RAdam takes no step before it can tell the variance, which is at the sixth.
    luthier.train({**values, "max_steps": 6 if "radam" in optim else 1})
    before = load_file(Path(values["model_name_or_path"], "model.safetensors"))
    after = load_file(Path(values["output_dir"], "model.safetensors"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The embeddings of words that no row has need not move.
    assert {name for name in before if "layers" in name} <= moved


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (
            {"optim": "galore_adamw"},
            "optim: 'galore_adamw': needs the names of the modules whose gradients are projected",
        ),
        ({"optim": "lomo", "gradient_accumulation_steps": 2}, "optim: 'lomo': applies each gradient as soon as"),
    ],
)
def test_requirements_of_an_optimizer_besides_its_library(values, monkeypatch, keys, text):
    monkeypatch.setattr("luthier.config.rules.optim.is_installed", lambda module: True)
    with pytest.raises(ConfigError) as caught:
        load_train({**values, **keys})
    assert text in str(caught.value)


NEEDED: dict[str, dict[str, Any]] = {
    "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": "numbers"},
    "greedy": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": "numbers"},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 0.5e-3}},
}
RATES = {
    "linear": [0, 1, 2 / 3, 1 / 3],
    "cosine": [0, 1, 0.75, 0.25],
    "cosine_with_restarts": [0, 1, 0.75, 0.25],
    "polynomial": [0, 1, 2 / 3, 1 / 3],
    "constant": [1, 1, 1, 1],
    "constant_with_warmup": [0, 1, 1, 1],
    "inverse_sqrt": [0, 1, 2**-0.5, 3**-0.5],
    "reduce_lr_on_plateau": [1, 1, 1, 1],
    "cosine_with_min_lr": [0, 1, 0.875, 0.625],
    "cosine_warmup_with_min_lr": [1, 0.875, 0.625, 0.5],
    "warmup_stable_decay": [0, 1, 1, 0.5],
    "greedy": [1, 1, 1, 1],
}
"""Shares of the rate over four steps, the first of them warm-up; `cosine_warmup_with_min_lr` warms up from 1 / 1."""


@pytest.mark.parametrize("schedule", representatives(SCHEDULES, "linear", "cosine_with_min_lr", "greedy"))
def test_learning_rates_of_every_schedule(values, schedule):
    keys = {"lr_scheduler_type": schedule, "max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    result = luthier.train({**values, **keys, **NEEDED.get(schedule, {})})
    rates = [logs["learning_rate"] for logs in result.log_history if "learning_rate" in logs]
    assert rates == pytest.approx([1e-3 * share for share in RATES[schedule]], rel=1e-3)


def test_the_settings_of_schedules_are_those_of_transformers():
    """`lr_scheduler_kwargs` is checked before torch is imported, so the names stand in a table."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    passed = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    classes = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    for schedule, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        names = inspect.signature(classes.get(schedule.value, function)).parameters.keys() - passed
        assert names == set(SETTINGS[schedule.value]), schedule
    assert SETTINGS.keys() == set(SCHEDULES)


def test_a_plateau_lowers_the_rate(values):
    """With a rate of nothing, no evaluation is better than the one before."""
    keys = {"lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 5, "learning_rate": 1e-12}
    kwargs = {"lr_scheduler_kwargs": {"patience": 1, "factor": 0.5, "eps": 0.0}}
    result = luthier.train({**values, **keys, **kwargs, **NEEDED["reduce_lr_on_plateau"]})
    rates = [logs["learning_rate"] for logs in result.log_history if "learning_rate" in logs]
    assert rates[0] == 1e-12 and rates[-1] == pytest.approx(0.5e-12)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ("reduce_lr_on_plateau", "goes by the metric of evaluations, and there are none while training"),
        ("greedy", "goes by the metric of evaluations, and there are none while training"),
        ("cosine_with_min_lr", "needs the smallest learning rate"),
        ("cosine_warmup_with_min_lr", "needs the smallest learning rate"),
    ],
)
def test_what_a_schedule_needs(values, schedule, text):
    with pytest.raises(ConfigError) as caught:
        load_train({**values, "lr_scheduler_type": schedule})
    assert f"lr_scheduler_type: '{schedule}': {text}" in str(caught.value)


def test_a_warm_up_that_a_schedule_does_not_have_is_a_warning(values):
    (warning,) = load_train({**values, "warmup_ratio": 0.1}).warnings
    assert "warmup_ratio: 0.1: has no effect: this schedule has no warm-up" in str(warning)


def test_early_stopping_and_the_best_model(values):
    """A rate that spoils the model: the first evaluation stays the best; two more end the run."""
    keys = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": "numbers", "early_stopping_steps": 2}
    keys |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    keys |= {"optim": "sgd", "learning_rate": 300.0, "max_steps": 8, "max_grad_norm": 1.0}
    result = luthier.train({**values, **keys})
    seen = {logs["step"]: logs["eval_loss"] for logs in result.log_history if "eval_loss" in logs}
    best = min(seen, key=seen.__getitem__)
    assert len(losses(result)) == best + 2 < 8
    kept = load_file(Path(values["output_dir"], f"checkpoint-{best}", "model.safetensors"))
    final = load_file(Path(values["output_dir"], "model.safetensors"))
    assert all(torch.equal(kept[name], final[name]) for name in kept)


@pytest.mark.skipif(not is_installed("bitsandbytes"), reason="bitsandbytes is not installed")
def test_embeddings_of_one_run_take_no_memory_of_the_next(values):
    """transformers asks for 32 bits for embeddings, and bitsandbytes would remember where their weights stand."""
    luthier.train({**values, "optim": "adamw_8bit"})
    lora = {
        "finetuning_type": "lora",
        "lora_rank": 64,
        "lora_target": "q_proj",
        "output_dir": f"{values['output_dir']}-2",
    }
    luthier.train({**values, **lora, "optim": "adamw_8bit", "save_strategy": "steps", "save_steps": 1})
    saved = torch.load(Path(lora["output_dir"], "checkpoint-1", "optimizer.pt"), weights_only=True)["state"]
    moments = [part["state1"].dtype for state in saved.values() for part in state.values() if isinstance(part, dict)]
    assert set(moments) == {torch.uint8}
