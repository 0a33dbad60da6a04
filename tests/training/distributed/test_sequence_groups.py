"""The processes of a group read the same rows, and the groups share all rows as single processes would."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from luthier.training.distributed.sequence_groups import SequenceGroups, rows_by_group, sequence_groups

CPU = torch.device("cpu")


@contextmanager
def groups_of(rank: int, num_processes: int, sp_size: int) -> Iterator[SequenceGroups]:
    """Seen by one process; torch's stand-in for a network connects the others."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_processes)
    try:
        groups = sequence_groups(sp_size, CPU)
        assert groups is not None
        yield groups
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(("num_processes", "sp_size"), [(2, 2), (4, 2), (6, 3), (4, 4)])
def test_the_rows_of_a_group(num_processes, sp_size):
    read = []
    for rank in range(num_processes):
        with groups_of(rank, num_processes, sp_size) as groups:
            assert (groups.size, groups.part, groups.group.size()) == (sp_size, rank % sp_size, sp_size)
            loader = prepare_data_loader(
                DataLoader(range(24), batch_size=2),
                CPU,
                num_processes=num_processes,
                process_index=rank,
                torch_device_mesh=groups.mesh,
            )
            read.append([row for batch in loader for row in batch.tolist()])
    whole = [rows for rank, rows in enumerate(read) if rank % sp_size == 0]
    assert read == [rows for rows in whole for _ in range(sp_size)]
    assert sorted(row for rows in whole for row in rows) == list(range(24))


def test_without_groups_each_process_has_its_own_rows():
    assert sequence_groups(1, CPU) is None


def test_accelerate_knows_the_groups_while_rows_are_shared():
    accelerator = Accelerator()
    usual = accelerator.state.device_mesh
    with groups_of(0, 2, 2) as groups:
        with rows_by_group(accelerator, groups):
            assert accelerator.torch_device_mesh is groups.mesh
        assert accelerator.torch_device_mesh is usual
    with rows_by_group(accelerator, None):
        assert accelerator.torch_device_mesh is usual
