"""While KTransformers loads and computes, its kernels read the experts and are told which pass is computed."""

import importlib.util
import sys
import types

import pytest
import torch

from luthier.model.checkpointing import enable_checkpointing
from luthier.model.compat.ktransformers import without_experts
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from tests.tiny import tiny_llama


@pytest.fixture
def kt(monkeypatch):
    """The two functions that are called, in the place of the packages, which count the passes through a block."""
    passes = []

    def context_fn():
        return passes_as("first"), passes_as("again")

    class passes_as:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            passes.append(self.name)

        def __exit__(self, *_):
            return None

    kernel, fork = types.ModuleType("kt_kernel"), types.ModuleType("transformers.integrations.kt")
    kernel.__spec__ = importlib.util.spec_from_loader("kt_kernel", None)
    sft = types.ModuleType("kt_kernel.sft")
    sft.get_activation_checkpoint_context_fn = lambda: context_fn
    fork.is_kt_routed_expert_parameter_name = lambda name: ".mlp." in name
    for name, module in (("kt_kernel", kernel), ("kt_kernel.sft", sft), ("transformers.integrations.kt", fork)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("ACCELERATE_USE_KT", "true")
    return passes


def test_weights_that_the_kernel_reads_are_not_missing(kt):
    found = {"missing_keys": ["a.mlp.w", "b"], "unexpected_keys": {"c.mlp.w"}, "error_msgs": []}
    kept = without_experts(found)
    assert kept == {"missing_keys": ["b"], "unexpected_keys": [], "error_msgs": []}


def test_without_it_nothing_is_forgiven():
    found = {"missing_keys": ["a.mlp.w"], "unexpected_keys": []}
    assert without_experts(found) is found


def test_experts_are_told_which_pass_is_computed(kt, tmp_path):
    """Each of two blocks runs forward once, and once more in the backward pass, in reverse order."""
    model = load_model(ModelSource(str(tiny_llama(tmp_path))), dtype=torch.float32).train()
    enable_checkpointing(model, use_reentrant=True)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert kt == ["first", "first", "again", "again"]
    assert all(weight.grad is not None for weight in model.parameters())
