"""Liger kernels: what keeps them from running, and what is said then."""

import dataclasses
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.machine import detect
from luthier.core.versions import is_installed
from luthier.model.features import Purpose, Training
from luthier.model.features.liger import LigerConfig, on_model

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
