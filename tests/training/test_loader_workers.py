"""Workers of a data loader and a signal that comes while they start."""

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset

from luthier.training.loader_workers import serve
from tests import killable


@pytest.fixture(autouse=True)
def folder_apart() -> None:
    killable.keep_folder_apart()


class Signalled(Dataset):
    """A worker that is spawned reads it first of all, before it can ignore a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        os.kill(os.getpid(), self.number)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), self.number)  # ignored by now
        return index


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_signal_does_not_end_workers_that_start(method, number):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = DataLoader(Signalled(number), num_workers=1, multiprocessing_context=method)
    serve(loader)
    assert [int(batch) for batch in loader] == [0, 1]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_loaders_without_workers_are_as_before():
    loader = DataLoader([1, 2])
    serve(loader)
    assert [int(batch) for batch in loader] == [1, 2]


def test_the_loader_of_a_resumed_run_starts_its_workers_in_the_same_way():
    """accelerate makes another one, which skips the rows that were read before."""
    loader = prepare_data_loader(DataLoader([1, 2, 3], num_workers=1, multiprocessing_context="spawn"))
    serve(loader.base_dataloader)
    later = skip_first_batches(loader, 1).base_dataloader
    assert later.multiprocessing_context is loader.base_dataloader.multiprocessing_context
    assert later.worker_init_fn is loader.base_dataloader.worker_init_fn


def test_other_processes_of_a_fork_server_end_by_signals():
    loader = DataLoader([1, 2], num_workers=1, multiprocessing_context="forkserver")
    serve(loader)
    assert [int(batch) for batch in loader] == [1, 2]
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    other.start()
    other.terminate()
    other.join(60)
    assert other.exitcode == -signal.SIGTERM


def test_workers_that_stay_take_no_random_numbers_of_the_run():
    """A resumed run starts them in a later epoch, and has the same numbers left for dropout."""
    before = torch.get_rng_state()
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    serve(loader)
    resumed = skip_first_batches(prepare_data_loader(loader), 1)
    for _ in range(2):
        assert len(list(loader)) == 4 and len(list(resumed)) == 3
    assert torch.equal(torch.get_rng_state(), before)
