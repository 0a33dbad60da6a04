"""What keys change in a model, and what is said where they cannot."""

import dataclasses
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.machine import detect
from luthier.core.versions import is_installed
from luthier.model.loading.configure import apply_liger_kernels, resolved_settings

RUN: dict[str, Any] = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x"}


@pytest.mark.skipif(is_installed("liger_kernel"), reason="liger-kernel is installed")
def test_kernels_that_are_not_installed_are_one_problem():
    with pytest.raises(ConfigError, match="liger-kernel, which is not installed -> pip install liger-kernel"):
        load_train({**RUN, "enable_liger_kernel": True})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("use_liger_kernel", "set enable_liger_kernel: true"),
        ("use_unsloth", "needs the library unsloth, which is not installed"),
        ("use_kt", "needs the packages kt-kernel, transformers-kt, accelerate-kt"),
    ],
)
def test_what_is_refused_has_a_reason(key, words):
    with pytest.raises(ConfigError, match=words):
        load_train({**RUN, key: True})


def test_kernels_need_a_gpu(llama_folder, said):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    apply_liger_kernels(model, dataclasses.replace(detect(), device="cpu"))
    assert any("need a GPU" in line for line in said)


def test_the_manifest_gets_what_open_choices_became(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="sdpa")
    assert resolved_settings(model) == {"attention": "sdpa", "dtype": "float32"}
    model.config.rope_parameters["rope_type"] = "yarn"
    assert resolved_settings(model)["rope"] == "yarn"
