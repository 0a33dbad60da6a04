"""What the launcher tells of a run whose processes failed: which one was first, its log, where the others were."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.training.distributed.peers import read_place

SHOWN_LINES = 8
"""Shown of the log of a process that failed."""
TOLD = (2, 130)
"""Statuses with which all processes end alike: what the user gave is wrong, or a signal stopped the run."""


@dataclass(frozen=True, slots=True)
class FailedProcesses:
    """Those of this machine."""

    failures: Mapping[int, Any]
    """Rank -> torchrun's `ProcessFailure`."""
    logs: Path
    """The folder that torchrun was given for its logs."""

    @property
    def culprit(self) -> int:
        """The rank of the process that failed first: one that a signal ended, else one that has lost no other one.

        torchrun knows the time to the second only, in which all others fail too. It ends them with SIGTERM, so of those
        that have ended with a status of `TOLD`, one is the first.
        """
        others_are_ended = any(failure.exitcode in TOLD for failure in self.failures.values())

        def order(rank: int) -> tuple[bool, bool, float, int]:
            failure = self.failures[rank]
            place = read_place(self.folder_of(failure)) or {}
            was_ended = others_are_ended and failure.exitcode == -signal.SIGTERM
            is_late = was_ended or bool(place.get("lost_peer"))
            return failure.exitcode >= 0 or was_ended, is_late, failure.timestamp, rank

        return min(self.failures, key=order)

    @property
    def status(self) -> int:
        """The exit status of the run."""
        status: int = self.failures[self.culprit].exitcode
        return status if status > 0 else 1

    def report(self) -> Iterator[str]:
        """Nothing if the first process of this machine has failed by itself: it has said why on the terminal."""
        rank, failure = self.culprit, self.failures[self.culprit]
        was_killed = failure.exitcode < 0
        if not was_killed and (failure.local_rank == 0 or failure.exitcode in TOLD):
            return
        how = f"was ended by {failure.signal_name()}" if was_killed else f"ended with status {failure.exitcode}"
        yield f"rank {rank} {how} (process {failure.local_rank} of this machine, pid {failure.pid})"
        log = self.folder_of(failure) / "stderr.log"
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            yield from (f"  | {line}" for line in lines[-SHOWN_LINES:])
            yield f"  its log: {log}"
        for folder in sorted(self.last_attempt().glob("[0-9]*"), key=lambda folder: int(folder.name)):
            place = read_place(folder)
            if place is not None:
                yield f"  process {folder.name} of this machine was in {place['place']}"

    def folder_of(self, failure: Any) -> Path:
        """Where torchrun keeps the log of a process."""
        return self.last_attempt() / str(failure.local_rank)

    def last_attempt(self) -> Path:
        """The folder of the last start of the processes; elastic runs start them again."""
        attempts = self.logs.glob("*/attempt_*")
        return max(attempts, key=lambda folder: int(folder.name.rpartition("_")[2]), default=self.logs)
