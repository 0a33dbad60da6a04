"""accelerate 1.x on CPUs: FSDP is passed over without a word, and every process trains with whole weights (DDP).

`AcceleratorState` looks at an FSDP plugin only if the processes are ones of accelerators. FSDP 2 itself runs on CPUs
with gloo. So they are called that while the `Accelerator` is made, which chooses FSDP then and remembers it.
https://github.com/huggingface/accelerate/blob/main/src/accelerate/state.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def fsdp_on_cpu(is_asked: bool) -> Iterator[None]:
    """While open, an `Accelerator` that is made takes its FSDP plugin on CPUs too. `is_asked`: the run sets `fsdp`."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState._shared_state
    if not is_asked or state.get("distributed_type") != DistributedType.MULTI_CPU:
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state.get("distributed_type") == DistributedType.MULTI_GPU:  # it has not become FSDP
            state["distributed_type"] = DistributedType.MULTI_CPU


def arrived(state: "dict[str, Any] | None") -> "dict[str, Any] | None":
    """`state` with plain tensors. On CPUs a gathered weight is still on its way, and has no memory until it is waited
    for; on accelerators PyTorch waits when it copies it to the CPU."""
    if state is None:
        return None
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return {name: value.wait() if isinstance(value, AsyncCollectiveTensor) else value for name, value in state.items()}
