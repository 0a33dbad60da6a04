"""Warnings and errors about a run's dtype, by machine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Seq2SeqTrainingArguments

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.machine import Machine
from luthier.training.arguments import gathering, tell_long_warm_up, training_arguments

BASE = {"model_name_or_path": "m", "dataset": "d", "do_train": True}
SIZES = {"memory_bytes": 2**36, "device_memory_bytes": 2**36, "num_cpus": 8}
GPU = Machine(device="cuda", num_accelerators=1, bf16=True, fp16=True, **SIZES)
CPU = Machine(device="cpu", num_accelerators=0, bf16=True, fp16=False, **SIZES)


@pytest.mark.parametrize(
    ("keys", "machine", "count"),
    [
        ({}, GPU, 1),
        ({}, CPU, 0),
        ({"bf16": True}, CPU, 0),
        ({"pure_bf16": True}, GPU, 0),
        ({"do_train": False, "do_eval": True, "val_size": 0.1}, GPU, 0),
    ],
)
def test_a_run_in_float32_on_an_accelerator_is_a_warning(tmp_path, said, keys, machine, count):
    training_arguments(load_train({**BASE, "output_dir": str(tmp_path), **keys}), machine)
    assert sum("neither bf16 nor fp16 is set" in text for text in said) == count


@pytest.mark.parametrize(
    ("keys", "num_steps", "told"),
    [
        (
            {"warmup_steps": 100},
            100,
            "ends with step 100 and training with step 100, so the learning rate never reaches 0.001",
        ),
        ({"warmup_steps": 99}, 100, None),
        ({"warmup_ratio": 0.1}, 1, "ends with step 1 and training with step 1,"),
        ({"warmup_ratio": 0.9}, 100, None),
        ({}, 1, None),
        (
            {"warmup_steps": 100, "lr_scheduler_type": "constant_with_warmup"},
            10,
            "ends with step 100 and training with step 10,",
        ),
        ({"warmup_steps": 100, "lr_scheduler_type": "constant"}, 10, None),
    ],
)
def test_a_warm_up_that_is_longer_than_training_is_a_warning(tmp_path, said, keys, num_steps, told):
    args = training_arguments(load_train({**BASE, "output_dir": str(tmp_path), "learning_rate": 1e-3, **keys}), CPU)
    said.clear()
    tell_long_warm_up(args, num_steps)
    assert len(said) == bool(told) and all(told in text for text in said)


def test_one_process_trains_on_one_device(tmp_path, said):
    class ManyDevices(Seq2SeqTrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    run = load_train({**BASE, "output_dir": str(tmp_path), "per_device_train_batch_size": 2})
    args = training_arguments(run, CPU, kind=ManyDevices)
    assert args.n_gpu == 1 and args.train_batch_size == 2
    assert any("one of 4 devices" in text for text in said)


@pytest.mark.parametrize(
    ("keys", "machine", "expected"),
    [
        ({}, GPU, True),
        ({}, CPU, False),
        ({"dataloader_pin_memory": False}, GPU, False),
        ({"accelerator_config": {"even_batches": False}}, GPU, True),
        ({"accelerator_config": {"non_blocking": False}}, GPU, False),
    ],
)
def test_batches_in_pinned_memory_are_copied_while_the_host_goes_on(tmp_path, keys, machine, expected):
    args = training_arguments(load_train({**BASE, "output_dir": str(tmp_path), **keys}), machine)
    assert args.accelerator_config.non_blocking is expected
    asked = keys.get("accelerator_config", {})
    assert args.accelerator_config.even_batches is asked.get("even_batches", True)


STEPS = (1, 2, 3, 4, 2.5, 0.1, 0.2, 0.25, 0.3, 0.7)


@pytest.mark.parametrize("saves", STEPS)
@pytest.mark.parametrize("evaluates", STEPS)
def test_the_rules_refuse_the_steps_that_transformers_refuses(tmp_path, evaluates, saves):
    """With the best model wanted; the refusal names the keys and comes before torch is loaded."""
    keys = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": evaluates, "save_steps": saves}
    try:
        Seq2SeqTrainingArguments(output_dir=str(tmp_path), save_strategy="steps", use_cpu=True, **keys)
        is_refused = False
    except ValueError:
        is_refused = True
    run_file = {**BASE, "output_dir": str(tmp_path), "val_size": 0.1, **keys}
    if is_refused:
        with pytest.raises(ConfigError, match=r"(save|eval)_steps"):
            load_train(run_file)
    else:
        assert load_train(run_file).training["save_steps"] == saves


@pytest.mark.parametrize(
    "keys",
    [
        {"logging_steps": 2.5},
        {"save_steps": 2.5},
        {"eval_strategy": "steps", "eval_steps": 2.5},
        {"torch_empty_cache_steps": 0},
        {"dataloader_prefetch_factor": 2},
    ],
)
def test_what_transformers_refuses_is_refused_by_a_rule(tmp_path, keys):
    with pytest.raises(ValueError, match=list(keys)[-1]):
        Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **keys)
    with pytest.raises(ConfigError, match=list(keys)[-1]):
        load_train({**BASE, "output_dir": str(tmp_path), "val_size": 0.1, **keys})


def test_the_rules_know_what_transformers_takes():
    from dataclasses import fields

    from transformers.debug_utils import DebugOption
    from transformers.trainer_pt_utils import AcceleratorConfig

    from luthier.config.rules.training import ACCELERATOR_KEYS, DEBUG_OPTIONS

    assert {field.name for field in fields(AcceleratorConfig)} == set(ACCELERATOR_KEYS)
    assert {option.value for option in DebugOption} == set(DEBUG_OPTIONS)


STRATEGIES = ("no", "steps", "epoch")
STEPS = st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 0.1, 0.25, 0.3, 0.5, 1.5, 2.5])
WHEN = {
    "eval_strategy": st.sampled_from(STRATEGIES),
    "save_strategy": st.sampled_from([*STRATEGIES, "best"]),
    "logging_strategy": st.sampled_from(STRATEGIES),
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "logging_steps": STEPS,
    "load_best_model_at_end": st.booleans(),
    "metric_for_best_model": st.sampled_from(["loss", "eval_loss", "accuracy"]),
    "greater_is_better": st.booleans(),
    "save_total_limit": st.integers(-1, 3),
    "eval_delay": st.sampled_from([0, 1, 2.5]),
    "max_steps": st.sampled_from([-1, 4]),
    "warmup_steps": st.sampled_from([0, 2, 0.1, 1.5]),
    "warmup_ratio": st.sampled_from([0.0, 0.1]),
    "lr_scheduler_type": st.sampled_from(
        ["linear", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"]
    ),
    "lr_scheduler_kwargs": st.sampled_from([{}, {"min_lr": 1e-5}, {"num_decay_steps": 2}]),
    "debug": st.sampled_from(["", "underflow_overflow", "all"]),
    "accelerator_config": st.sampled_from([{"split_batches": True}, {"split": True}, "{}"]),
}


@given(st.fixed_dictionaries({}, optional=WHEN))
@settings(max_examples=300, deadline=None)
def test_what_the_rules_let_through_transformers_builds(keys):
    try:
        run = load_train({**BASE, "val_size": 0.1, "output_dir": "o", **keys})
    except ConfigError:
        return
    training_arguments(run, CPU)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, True),
        ({"stage": 2}, None),
        ("none", None),
    ],
)
def test_zero_3_saves_whole_weights(zero, expected):
    given_ones = {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    found = gathering(given_ones)
    assert found["bf16"] is given_ones["bf16"]
    assert expected is None or found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is expected
    assert expected is not None or found == given_ones


def test_fsdp_offloads_nothing_on_cpus(tmp_path, said, monkeypatch):
    """torch would pin the memory, which needs an accelerator."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it for the whole process
    run = load_train({**BASE, "output_dir": str(tmp_path), "fsdp": "full_shard offload"})
    assert training_arguments(run, CPU).fsdp_config["cpu_offload"] is False
    assert any("offloading is left out" in line for line in said)
