"""What torchrun is told, from the environment variables of LLaMA-Factory."""

import os
from pathlib import Path

import pytest

from luthier.core.errors import InvalidInput
from luthier.workflow.launch.torchrun import grow_segments, nproc_of, torchrun_arguments

NUM_CPUS = 6


@pytest.mark.parametrize(
    ("asked", "num_accelerators", "expected"),
    [
        (None, 0, 1),
        (None, 4, 4),
        ("3", 4, 3),
        ("auto", 4, 4),
        ("auto", 0, NUM_CPUS),
        ("gpu", 2, 2),
        ("cpu", 2, NUM_CPUS),
    ],
)
def test_processes_of_a_machine(monkeypatch, asked, num_accelerators, expected):
    monkeypatch.setattr("luthier.workflow.launch.torchrun.num_accelerators", lambda: num_accelerators)
    monkeypatch.setattr("luthier.workflow.launch.torchrun.num_cpus", lambda: NUM_CPUS)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    if asked is not None:
        monkeypatch.setenv("NPROC_PER_NODE", asked)
    assert nproc_of(torchrun_arguments(["run.yaml"], Path("logs"), num_devices=None)) == str(expected)


@pytest.mark.parametrize("asked", ["gpu", "0", "two", "-1", ""])
def test_a_number_of_processes_that_is_none(monkeypatch, asked):
    monkeypatch.setattr("luthier.workflow.launch.torchrun.num_accelerators", lambda: 0)
    monkeypatch.setenv("NPROC_PER_NODE", asked)
    with pytest.raises(InvalidInput, match="NPROC_PER_NODE: "):
        torchrun_arguments(["run.yaml"], Path("logs"), num_devices=None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"OPTIM_TORCH": "1"}, "expandable_segments:True"),
        ({"OPTIM_TORCH": "0"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_segments_of_gpu_memory_grow_unless_the_user_decides(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    grow_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


def test_its_processes_know_who_started_them(monkeypatch):
    """So that one that starts while the launcher is killed ends too."""
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    words = torchrun_arguments(["run.yaml", "lora_rank=4"], Path("logs"), num_devices=None)
    assert words[-6:] == ["-m", "luthier.workflow.launch.child", str(os.getpid()), "train", "run.yaml", "lora_rank=4"]
