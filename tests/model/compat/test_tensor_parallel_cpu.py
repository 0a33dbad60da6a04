"""accelerate refuses tensor parallelism on CPUs; tests/runs/test_tensor_parallel.py trains with it."""

from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from luthier.model.compat.tensor_parallel_cpu import tensor_parallel_on_cpu
from tests.model.compat.test_fsdp_cpu import two_processes

__all__ = ["two_processes"]


def validated() -> AcceleratorState:
    config = ParallelismConfig(tp_size=2)
    dynamo = SimpleNamespace(backend="NO")
    state = AcceleratorState(parallelism_config=config, dynamo_plugin=dynamo, _from_accelerator=True)
    multi_device = state.use_distributed and state.distributed_type is not DistributedType.MULTI_CPU
    config._validate_accelerator(
        SimpleNamespace(
            num_processes=2, is_fsdp2=False, multi_device=multi_device, distributed_type=state.distributed_type
        )
    )
    return state


def test_accelerate_itself_refuses_it(two_processes):
    """Once this fails, `tensor_parallel_on_cpu` is not needed any more."""
    with pytest.raises(ValueError, match="ParallelismConfig is only compatible"):
        validated()


def test_split_layers_are_taken_on_cpus(two_processes):
    with tensor_parallel_on_cpu(SimpleNamespace(tp_size=2)):
        state = validated()
    assert state.distributed_type is two_processes["distributed_type"] is DistributedType.MULTI_CPU


def test_other_models_stay_as_they_are(two_processes):
    with tensor_parallel_on_cpu(SimpleNamespace(tp_size=None)):
        assert two_processes["distributed_type"] is DistributedType.MULTI_CPU
    assert PartialState._shared_state is two_processes
