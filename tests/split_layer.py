"""A layer as one of two processes has it that share its weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor


@contextmanager
def split_layer(dtype: torch.dtype = torch.float32) -> Iterator[nn.Linear]:
    """A (4, 6) matrix whose columns are split; the other process is made up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        linear = nn.Linear(6, 4, bias=False, dtype=dtype)
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(1)], src_data_rank=None))
        yield linear
    finally:
        torch.distributed.destroy_process_group()
