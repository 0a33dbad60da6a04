"""`full_determinism` of one run is not that of the next run in the same process."""

import os

import torch
from transformers import enable_full_determinism

import luthier
from luthier.training.determinism import restoring_kernels
from tests.small_world import small_world


def state():
    cudnn = torch.backends.cudnn
    return (
        dict(os.environ),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        (cudnn.deterministic, cudnn.benchmark),
    )


def test_everything_that_transformers_switches_on_is_switched_off_again(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = state()
    with restoring_kernels():
        enable_full_determinism(1)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert state() == before


def test_a_run_leaves_them_as_they_were(tmp_path):
    before = state()[1:]
    luthier.train({**small_world(tmp_path), "max_steps": 1, "full_determinism": True, "report_to": "none"})
    assert state()[1:] == before and "CUDA_LAUNCH_BLOCKING" not in os.environ
