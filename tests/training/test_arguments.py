"""Warnings and errors about a run's dtype, by machine."""

import pytest
from transformers import Seq2SeqTrainingArguments

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.machine import Machine
from luthier.training.arguments import training_arguments

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
