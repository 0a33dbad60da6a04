"""All-to-all between processes, which are threads here with a gloo connection each."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroup, ProcessGroupGloo

from luthier.model.kernels.exchange import exchange

NUM_PROCESSES = 3


def connected(store: HashStore, rank: int) -> ProcessGroup:
    gloo = ProcessGroup.BackendType.GLOO
    group = ProcessGroup(store, rank, NUM_PROCESSES)
    group._set_default_backend(gloo)
    backend = ProcessGroupGloo(PrefixStore("cpu", store), rank, NUM_PROCESSES, timedelta(seconds=60))
    group._register_backend(torch.device("cpu"), gloo, backend)
    return group


def in_each(work) -> list[torch.Tensor]:
    """What `work(rank, group)` returns in each process."""
    store = HashStore()

    def start(rank: int) -> torch.Tensor:
        return work(rank, connected(store, rank))

    with ThreadPoolExecutor(NUM_PROCESSES) as threads:
        return list(threads.map(start, range(NUM_PROCESSES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_r_of_process_s_becomes_block_s_of_process_r(dtype):
    sent = torch.randn(NUM_PROCESSES, NUM_PROCESSES, 4, 5).to(dtype)
    received = torch.stack(in_each(lambda rank, group: exchange(sent[rank], group)))
    assert torch.equal(received, sent.transpose(0, 1))


def test_gradients_go_back_to_where_the_blocks_came_from():
    """loss_r = sum_s w_r[s] . y_r[s] with y_r[s] = x_s[r], so d (sum of all losses) / d x_s[r] = w_r[s]."""
    weights = torch.randn(NUM_PROCESSES, NUM_PROCESSES, 6)

    def gradient(rank, group):
        blocks = torch.randn(NUM_PROCESSES, 6, requires_grad=True)
        (exchange(blocks, group) * weights[rank]).sum().backward()
        return blocks.grad

    assert torch.equal(torch.stack(in_each(gradient)), weights.transpose(0, 1))
