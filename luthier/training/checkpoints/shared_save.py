"""A save that all processes of a run make together, so that they agree whether it has succeeded.

A process whose disk fails must not leave the save alone: the others would wait for it in the next collective operation.
It notes the fault, writes nothing more, and takes part in everything else. Then all tell each other, and all raise the
same error.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate.utils import gather_object

from luthier.core.files import DiskFaults
from luthier.training.checkpoints.store import NotSaved


class SharedSave:
    """One save."""

    def __init__(
        self,
        sentence: Callable[[OSError], str] = str,
        *,
        is_writer: bool = True,
        num_processes: int = 1,
        goes_on: bool = True,
    ) -> None:
        """`sentence`: what a fault means. `is_writer`: one process of those that share a disk. `goes_on`: whether a
        process with a fault can take part in the rest; else it raises the fault at once, as a run of one process does.
        """
        self.sentence, self.is_writer, self.num_processes = sentence, is_writer, num_processes
        self.goes_on = goes_on and num_processes > 1
        self.fault: OSError | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Wraps writing. No collective operation may follow inside, since a fault ends the block."""
        try:
            with DiskFaults(), _ToldByAll():
                yield
        except OSError as fault:
            if not self.goes_on:
                raise
            self.fault = self.fault or fault

    @contextmanager
    def noting_in_libraries(self) -> Iterator[None]:
        """While open, `torch.save` and `os.makedirs` note a fault too, and do nothing after it. transformers and
        accelerate call them between collective operations."""
        if not self.goes_on:
            yield
            return
        library: Any = torch
        save, makedirs = torch.save, os.makedirs
        library.save, os.makedirs = self._noting(save), self._noting(makedirs)
        try:
            yield
        finally:
            library.save, os.makedirs = save, makedirs

    def _noting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def noted(*args: Any, **kwargs: Any) -> None:
            if self.fault is None:
                with self.noting():
                    call(*args, **kwargs)

        return noted

    def agree(self) -> None:
        """Waits for all processes. All of them raise `NotSaved` if one has noted a fault."""
        if self.num_processes == 1:
            return
        told: list[str | None] = gather_object([None if self.fault is None else self.sentence(self.fault)])
        fault = next(filter(None, told), None)
        if fault is not None:
            raise NotSaved(fault)


class _ToldByAll:
    """Where each process writes its own shards, torch tells all of them of a fault, in an exception that is no
    `Exception`. A context that raises the fault itself."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, told: BaseException | None, trace: object) -> None:
        if told is None or isinstance(told, (Exception, KeyboardInterrupt, SystemExit, GeneratorExit)):
            return
        from torch.distributed.checkpoint.api import CheckpointException

        if isinstance(told, CheckpointException):
            fault, _ = next(iter(told.failures.values()))
            raise fault from told
