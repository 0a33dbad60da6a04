"""Tensor parallelism on CPUs, which transformers and torch have and accelerate refuses.

`ParallelismConfig._validate_accelerator` (accelerate 1.15.0, `parallelism_config.py`) takes processes on accelerators
only, though it does nothing for tensor parallelism but give processes the same rows. It is shown such processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def tensor_parallel_on_cpu(model: "nn.Module | None") -> Iterator[None]:
    """Wraps making an `Accelerator` for a model whose layers may be split over processes."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    shared: dict[str, Any] = PartialState._shared_state
    is_split = (getattr(model, "tp_size", None) or 1) > 1
    if not is_split or shared.get("distributed_type") is not DistributedType.MULTI_CPU:
        yield
        return
    shared["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        for state in (shared, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.MULTI_CPU
