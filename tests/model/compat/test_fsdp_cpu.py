"""accelerate passes over FSDP on CPUs; tests/runs/test_engines.py trains with it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from luthier.model.compat.fsdp_cpu import fsdp_on_cpu


@pytest.fixture
def two_processes(monkeypatch):
    """What accelerate knows in one of two processes on CPUs."""
    state = PartialState(cpu=True)
    shared = {**state.__dict__, "distributed_type": DistributedType.MULTI_CPU, "backend": "gloo", "num_processes": 2}
    monkeypatch.setattr(PartialState, "_shared_state", shared)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    return shared


def state_with_fsdp() -> AcceleratorState:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    dynamo = SimpleNamespace(backend="NO")
    return AcceleratorState(fsdp_plugin=plugin, dynamo_plugin=dynamo, _from_accelerator=True)


def test_accelerate_itself_trains_with_ddp(two_processes):
    """Once this fails, `fsdp_on_cpu` is not needed any more."""
    assert state_with_fsdp().distributed_type is DistributedType.MULTI_CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="FSDP is taken on GPUs here")
def test_fsdp_is_taken_on_cpus(two_processes):
    with fsdp_on_cpu(SimpleNamespace(fsdp_plugin_args={"fsdp_version": 2})):
        state = state_with_fsdp()
    assert state.distributed_type is DistributedType.FSDP and state.is_fsdp2
    assert state.device.type == "cpu" and state.num_processes == 2


def test_runs_without_fsdp_stay_as_they_are(two_processes):
    with fsdp_on_cpu(SimpleNamespace(fsdp_plugin_args=None)):
        assert two_processes["distributed_type"] is DistributedType.MULTI_CPU
