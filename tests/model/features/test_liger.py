"""Liger kernels: what keeps them from running, and what is said then."""

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.machine import detect
from luthier.core.versions import is_installed
from luthier.model.features import Purpose, Training
from luthier.model.features.liger import LigerConfig, on_model, restoring_layers
from luthier.model.kernels.fuse import fuse

RUN: dict[str, Any] = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x"}
ON = LigerConfig(enable_liger_kernel=True)


@pytest.mark.skipif(is_installed("liger_kernel"), reason="liger-kernel is installed")
def test_kernels_that_are_not_installed_are_one_problem():
    with pytest.raises(ConfigError, match="liger-kernel, which is not installed -> pip install liger-kernel"):
        load_train({**RUN, "enable_liger_kernel": True})


def test_the_key_of_the_trainer_names_this_one():
    with pytest.raises(ConfigError, match="set enable_liger_kernel: true"):
        load_train({**RUN, "use_liger_kernel": True})


def test_kernels_need_a_gpu(llama_folder, said):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    before = [type(module) for module in model.modules()]
    cpu = dataclasses.replace(detect(), device="cpu")
    purpose = Purpose(name="m", machine=cpu, training=Training(cutoff_len=8))
    on_model(ON, model, purpose)
    assert any("need a GPU" in line for line in said)
    assert before == [type(module) for module in model.modules()]


def test_nothing_is_said_where_a_model_is_not_trained(llama_folder, said):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    on_model(ON, model, Purpose(name="m", machine=detect()))
    assert not said


class LigerSwiGLUMLP(nn.Module):
    """As in 0.8.5: without biases, and computed by a kernel that needs a GPU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(*sizes, bias=False), nn.Linear(*sizes, bias=False)
        self.down_proj = nn.Linear(*reversed(sizes), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a kernel of Triton cannot read a CPU tensor")


def liger_rotation(*args: Any) -> Any:
    """Stands for a function that is looked up whenever an attention runs."""
    return ROTATION(*args)


ROTATION = modeling_llama.apply_rotary_pos_emb


@pytest.fixture
def patching(monkeypatch) -> Purpose:
    """The library replaces names in modules of transformers: apply_liger_kernel_to_llama of 0.8.5 does the first two,
    and apply_liger_kernel_to_mllama the last one."""
    from transformers.integrations import liger

    def apply(model: Any, **options: bool) -> None:
        assert options == {"fused_linear_cross_entropy": False, "cross_entropy": False}
        modeling_llama.LlamaMLP = LigerSwiGLUMLP  # type: ignore[assignment, misc]
        modeling_llama.apply_rotary_pos_emb = liger_rotation
        modeling_llama.nn.LayerNorm = type("LigerLayerNorm", (nn.Module,), {})  # type: ignore[misc]

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    library: Any = sys.modules["liger_kernel.transformers"]
    library._apply_liger_kernel_to_instance = apply
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}  # type: ignore[attr-defined]
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    return Purpose(name="m", machine=dataclasses.replace(detect(), device="cuda"), training=Training(cutoff_len=8))


def test_models_of_the_next_run_have_their_own_layers(llama_folder, patching):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    own, layers = dict(vars(modeling_llama)), dict(vars(nn))
    with restoring_layers():
        on_model(ON, model, patching)
        on_model(ON, model, patching)
        assert modeling_llama.apply_rotary_pos_emb is liger_rotation
    assert vars(modeling_llama) == own and vars(nn) == layers


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_frozen_model_of_the_same_run_has_its_own_layers(llama_folder, tmp_path, patching, is_fused):
    """It is loaded after the policy, and computes what it computes in a run without these kernels."""
    config = AutoConfig.from_pretrained(llama_folder, mlp_bias=True)
    with torch.random.fork_rng():
        given = AutoModelForCausalLM.from_config(config).eval()
        for parameter in given.parameters():
            nn.init.normal_(parameter, std=0.1)
    given.save_pretrained(tmp_path)
    policy, ids = AutoModelForCausalLM.from_pretrained(llama_folder), torch.arange(12)[None]
    expected = given(ids).logits
    with restoring_layers():
        on_model(ON, policy, patching)
        frozen = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        if is_fused:
            fuse(frozen)
        assert [type(module) for module in frozen.modules()] == [type(module) for module in given.modules()]
        torch.testing.assert_close(frozen(ids).logits, expected, rtol=1e-5 if is_fused else 0, atol=1e-5 * is_fused)
