"""Groups of processes that share the tokens of their batches (`sp_size`).

With P = `sp_size`, processes 0 to P - 1 are the first group, P to 2 P - 1 the second. All processes of a group read the
same rows; groups read different ones, as single processes do in data parallelism.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class SequenceGroups:
    mesh: "DeviceMesh"
    """(groups, processes of a group). Its names are those by which accelerate knows, with every engine, which processes
    read the same rows."""

    @property
    def size(self) -> int:
        """Processes of a group."""
        return int(self.mesh["tp"].size())

    @property
    def part(self) -> int:
        """Which part of a batch this process has."""
        return int(self.mesh["tp"].get_local_rank())

    @property
    def group(self) -> "ProcessGroup":
        return self.mesh["tp"].get_group()


def sequence_groups(sp_size: int, device: torch.device) -> SequenceGroups | None:
    """None where each process has batches of its own. All processes call it, and are a multiple of `sp_size`."""
    if sp_size == 1:
        return None
    num_processes = torch.distributed.get_world_size()
    shape = (num_processes // sp_size, sp_size)
    return SequenceGroups(init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "tp")))


@contextmanager
def rows_by_group(accelerator: "Accelerator", groups: SequenceGroups | None) -> Iterator[None]:
    """While open, accelerate gives all processes of a group the same rows."""
    if groups is None:
        yield
        return
    usual, accelerator.state.device_mesh = accelerator.state.device_mesh, groups.mesh
    try:
        yield
    finally:
        accelerator.state.device_mesh = usual
