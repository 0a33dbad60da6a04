"""Where a model goes that only answers."""

from dataclasses import replace

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.machine import Machine, detect
from luthier.model.loading.base import inference_dtype_of
from luthier.model.loading.merged import device_map_of


def test_a_single_process_may_use_all_devices_and_each_of_several_has_its_own():
    cpu = replace(detect(), device="cpu", num_accelerators=0)
    alone = replace(cpu, device="cuda", num_accelerators=4)
    assert device_map_of(cpu) is None
    assert device_map_of(alone) == "auto"
    assert device_map_of(replace(alone, world_size=4, local_rank=2)) == {"": "cuda:2"}


@pytest.mark.parametrize(
    ("keys", "checkpoint", "expected"),
    [
        ({}, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.bfloat16),
        ({"bf16": True}, torch.float32, torch.bfloat16),
        ({"fp16": True}, torch.bfloat16, torch.float16),
        ({"infer_dtype": "float16"}, torch.float32, torch.float16),
    ],
)
def test_an_evaluation_by_train_rounds_no_float32_checkpoint_unasked(keys, checkpoint, expected):
    base = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d", "stage": "sft", "template": "chatml"}
    run = load_train({**base, "do_train": False, "do_eval": True, "val_size": 0.1, **keys})
    machine = Machine(
        device="cuda", num_accelerators=1, bf16=True, fp16=True, memory_bytes=1, device_memory_bytes=1, num_cpus=1
    )
    assert inference_dtype_of(run, checkpoint=checkpoint, machine=machine) == expected
