"""Liger kernels: what keeps them from running, and what is said then."""

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.machine import detect
from luthier.core.versions import is_installed
from luthier.model.features import Purpose, Training
from luthier.model.features.liger import LigerConfig, on_model, restoring_layers

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


def test_models_of_the_next_run_have_their_own_layers(llama_folder, monkeypatch):
    """The library replaces names in modules of transformers: apply_liger_kernel_to_llama of 0.8.5 does these two."""
    from transformers.integrations import liger
    from transformers.models.llama import modeling_llama

    def apply(model: Any, **options: bool) -> None:
        assert options == {"fused_linear_cross_entropy": False, "cross_entropy": False}
        modeling_llama.LlamaMLP = type("LigerSwiGLUMLP", (), {})  # type: ignore[assignment, misc]
        modeling_llama.apply_rotary_pos_emb = lambda *args: None

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    library: Any = sys.modules["liger_kernel.transformers"]
    library._apply_liger_kernel_to_instance = apply
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}  # type: ignore[attr-defined]
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    own = dict(vars(modeling_llama))
    purpose = Purpose(name="m", machine=dataclasses.replace(detect(), device="cuda"), training=Training(cutoff_len=8))
    with restoring_layers():
        on_model(ON, model, purpose)
        on_model(ON, model, purpose)
        assert vars(modeling_llama)["LlamaMLP"] is not own["LlamaMLP"]
    assert vars(modeling_llama) == own
