"""FP8 training: what prevents it, and the settings that accelerate gets from the keys."""

import dataclasses
import os
from typing import Any

import pytest
import torch

import luthier
from luthier.config.keys.fp8 import Fp8Config
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, InvalidInput, MissingExtra
from luthier.core.machine import detect
from luthier.training import fp8
from luthier.training.arguments import training_arguments
from luthier.workflow.preflight.requirements import library_problems
from tests.small_world import losses, small_world

RUN: dict[str, Any] = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x", "fp8": True, "bf16": True}
CPU = dataclasses.replace(detect(), device="cpu", num_accelerators=0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quantization_bit": 4, "finetuning_type": "lora"}, "fp8: .*quantized weights are kept in formats"),
        ({"bf16": False}, "computed in bfloat16 -> set bf16: true"),
        ({"bf16": False, "fp16": True}, "computed in bfloat16 -> set bf16: true"),
        ({"fp8_backend": "te", "fp8_enable_fsdp_float8_all_gather": True}, "done by torchao only"),
        ({"fp8_backend": "apex"}, "fp8_backend"),
    ],
)
def test_incompatible_keys_are_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train(RUN | keys)


@pytest.mark.parametrize(("keys", "words"), [({"fp8": False}, "only by fp8: true"), ({}, "shards no weights")])
def test_an_fp8_all_gather_without_fsdp_is_a_warning(keys, words):
    warnings = load_train(RUN | {"fp8_enable_fsdp_float8_all_gather": True} | keys).warnings
    assert any(words in warning.reason for warning in warnings if warning.key.startswith("fp8_enable"))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("auto", "needs the library torchao or transformer_engine or msamp"),
        ("torchao", "needs the library torchao, which is not installed"),
        ("te", "needs the library transformer_engine"),
    ],
)
def test_a_missing_library_is_a_problem_before_anything_is_loaded(monkeypatch, backend, words):
    monkeypatch.setattr("luthier.config.keys.fp8.is_installed", lambda module: False)
    run = load_train(RUN | {"fp8_backend": backend})
    (problem,) = [problem for problem in library_problems(run) if problem.key == "fp8"]
    assert words in problem.reason and problem.remedy
    monkeypatch.setattr(fp8, "reason_against", lambda machine: "")
    with pytest.raises(MissingExtra, match=words):
        training_arguments(run, CPU)


def test_the_best_installed_library_is_used(monkeypatch):
    monkeypatch.setattr("luthier.config.keys.fp8.is_installed", lambda module: module != "torchao")
    assert [fp8.installed_backend(Fp8Config(fp8_backend=name)) for name in ("auto", "torchao", "te")] == [
        *("te", None, "te")
    ]


def test_a_machine_without_fp8_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="needs an NVIDIA or AMD GPU, and this machine uses its cpu"):
        training_arguments(load_train(RUN | {"output_dir": str(tmp_path)}), CPU)


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert fp8.reason_against(dataclasses.replace(CPU, device="cuda")) == (
        "FP8 training needs compute capability 8.9 (Ada, Hopper) or later, not 8.0"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not fp8.reason_against(dataclasses.replace(CPU, device="cuda"))


@pytest.mark.parametrize("gathers", [True, False])
def test_accelerate_gets_the_keys(monkeypatch, tmp_path, gathers):
    monkeypatch.setattr("luthier.config.keys.fp8.is_installed", lambda module: True)
    monkeypatch.setattr(fp8, "reason_against", lambda machine: "")
    keys = {"fp8_enable_fsdp_float8_all_gather": gathers, "output_dir": str(tmp_path), "fp8_backend": "torchao"}
    run = load_train(RUN | keys)
    args = training_arguments(run, CPU)
    assert args.mixed_precision == "fp8"
    names = ("ACCELERATE_FP8_BACKEND", "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER")
    monkeypatch.setenv(names[0], "NO")
    with fp8.settings_of(run.fp8):
        assert [os.environ[name] for name in names] == ["AO", str(gathers).lower()]
    assert [os.environ.get(name) for name in names] == ["NO", None]


def test_an_fp8_run_saves_an_ordinary_model(monkeypatch, tmp_path):
    """torchao has products in 8 bits for CPUs, too, slow ones, so the whole way can be gone here."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.float8.float8_linear import Float8Linear
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(fp8, "reason_against", lambda machine: "")
    seen: list[torch.nn.Module] = []
    forward = Float8Linear.forward
    monkeypatch.setattr(Float8Linear, "forward", lambda self, x: (seen.append(self), forward(self, x))[1])
    world = small_world(tmp_path / "world") | {"bf16": True, "learning_rate": 1e-3}
    plain = losses(luthier.train(world))
    small = losses(luthier.train(world | {"fp8": True, "output_dir": str(tmp_path / "fp8")}))
    num_swapped = len(set(map(id, seen)))
    assert losses(luthier.train(world)) == plain  # nothing of it is left in this process
    # 2 layers of 7 linear ones, all but the first; the last linear layer of the model is its head
    assert num_swapped == 13
    assert small != plain and small == pytest.approx(plain, rel=0.05)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
