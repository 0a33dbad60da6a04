"""Number formats of training and inference, by key, checkpoint and machine."""

import dataclasses

import pytest
import torch

from luthier.core.machine import Machine
from luthier.model.dtype import inference_dtype, training_dtype, upcast_norms, upcast_trainable, warn_slow_format
from tests.model.adapters.test_lora import build
from tests.split_layer import split_layer

CPU = Machine(
    device="cpu", num_accelerators=0, bf16=True, fp16=False, memory_bytes=1, device_memory_bytes=1, num_cpus=1
)


OLD_CPU = dataclasses.replace(CPU, bf16=False)


GPU = dataclasses.replace(CPU, device="cuda", num_accelerators=1, fp16=True)


OLD_GPU = dataclasses.replace(GPU, bf16=False)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("asked", "expected"), [({"bf16": True}, BF16), ({"pure_bf16": True}, BF16), ({"fp16": True}, FP16), ({}, FP32)]
)
def test_number_format_of_training(asked, expected):
    assert training_dtype(**{"bf16": False, "fp16": False, "pure_bf16": False} | asked) == expected


@pytest.mark.parametrize(
    ("asked", "checkpoint", "machine", "expected"),
    [
        ("float16", FP32, CPU, FP16),
        ("auto", BF16, CPU, BF16),
        ("auto", BF16, OLD_CPU, FP32),
        ("auto", FP16, CPU, FP32),
        ("auto", None, CPU, FP32),
        ("auto", FP32, CPU, FP32),
        ("auto", FP16, GPU, FP16),
        ("auto", None, GPU, BF16),
        ("auto", BF16, OLD_GPU, FP16),
    ],
)
def test_number_format_of_inference(asked, checkpoint, machine, expected):
    assert inference_dtype(asked, checkpoint=checkpoint, machine=machine) == expected


@pytest.mark.parametrize(
    ("dtype", "machine", "is_slow"),
    [(BF16, OLD_CPU, True), (BF16, CPU, False), (FP32, OLD_CPU, False), (BF16, OLD_GPU, False)],
)
def test_bfloat16_without_instructions_for_it_is_told(said, dtype, machine, is_slow):
    warn_slow_format(dtype, machine)
    assert ("bf16: this processor has no instructions for bfloat16" in "".join(said)) == is_slow


def test_weights_that_processes_share_are_upcast_in_their_parts():
    with split_layer(torch.bfloat16) as linear:
        weight, before = linear.weight, linear.weight.to_local().detach().clone()
        upcast_trainable(linear)
        assert linear.weight is weight and weight.requires_grad
        assert weight.dtype == weight.to_local().dtype == torch.float32 and before.dtype == torch.bfloat16
        assert torch.equal(weight.to_local(), before.float())


def test_upcast_layernorm_changes_norms_and_no_biases():
    model = build("llama", attention_bias=True).bfloat16()
    upcast_norms(model)
    changed = {name for name, weight in model.named_parameters() if weight.dtype == FP32}
    assert changed == {name for name, _ in model.named_parameters() if "norm" in name}
    assert changed and any(name.endswith("bias") for name, _ in model.named_parameters())
