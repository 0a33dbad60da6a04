"""The workers of a data loader, which outlive a signal: their process needs batches for the step that it finishes."""

import multiprocessing
from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.signals import Serving, holding_signals

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def serve(loader: "DataLoader[Any]") -> None:
    """Let the workers of `loader` ignore signals from the moment that they start.

    Those of a fork server are spawned instead. They would inherit which signals wait from the server, and so would all
    its other processes, which have to end by a signal.
    """
    loader.worker_init_fn = Serving(loader.worker_init_fn)
    if loader.num_workers:
        context: Any = loader.multiprocessing_context or multiprocessing
        # Of the settings of a loader, so accelerate gives it to the one that skips rows in a resumed run.
        loader.multiprocessing_context = _FORKING if context.get_start_method() == "fork" else _SPAWNING
    if loader.persistent_workers:
        # The seeds of workers would be random numbers of the run, and workers that stay take another number of them
        # than those that a resumed run starts. torch does not document how many.
        loader.generator = torch.Generator()


class _Forked(ForkProcess):
    def start(self) -> None:
        with holding_signals("fork"):
            super().start()


class _Spawned(SpawnProcess):
    def start(self) -> None:
        with holding_signals("spawn"):
            super().start()


class _Forking(ForkContext):
    Process = _Forked


class _Spawning(SpawnContext):
    Process = _Spawned


_FORKING, _SPAWNING = _Forking(), _Spawning()
