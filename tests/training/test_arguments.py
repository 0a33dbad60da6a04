"""Warnings and errors about a run's dtype, by machine."""

import pytest

from luthier.config.load import load_train
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
