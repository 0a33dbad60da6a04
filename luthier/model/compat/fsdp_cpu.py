"""FSDP on CPUs, which torch has and accelerate passes over: it trains with DDP there, without a word.

`AcceleratorState` (accelerate 1.15.0, `state.py`) takes FSDP for processes on accelerators only. It is shown such
processes while it is made; what it makes of them says FSDP and nothing else, and their device stays the CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from luthier.config.sections import is_on

if TYPE_CHECKING:
    from transformers import TrainingArguments


@contextmanager
def fsdp_on_cpu(args: "TrainingArguments") -> Iterator[None]:
    """Wraps making an `Accelerator` for these arguments."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    shared = PartialState._shared_state
    wants = args.fsdp_plugin_args is not None or is_on(os.environ, "ACCELERATE_USE_FSDP")
    if wants and shared.get("distributed_type") is DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    yield
