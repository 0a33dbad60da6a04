"""How long training waits for its batches, whose images, videos and audio are read while they are made."""

import math
import time
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")
NOTABLE_SHARE, NOTABLE_SECONDS = 0.05, 10
"""Of the time of training; waiting less than one of the two needs no remedy."""


class Waiting:
    """Adds up the seconds in which an iterator was asked for its next item."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        while True:
            start = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.monotonic() - start
            yield item

    def is_notable(self, total_seconds: float) -> bool:
        return self.seconds >= NOTABLE_SECONDS and self.seconds >= NOTABLE_SHARE * total_seconds

    def workers_needed(self, total_seconds: float, num_workers: int) -> int:
        """The workers that make a batch in the time in which the model computes one, so that it would not have waited.

        Without workers, all batches took `seconds` to make. Workers that are waited for are never idle, so each of them
        worked for `total_seconds`.
        """
        if not self.is_notable(total_seconds):
            return num_workers
        making = num_workers * total_seconds or self.seconds
        return math.ceil(making / max(total_seconds - self.seconds, 1e-3))

    def remark(self, total_seconds: float, num_workers: int) -> str:
        """For the log, of a training with media that took `total_seconds`."""
        share = self.seconds / max(total_seconds, 1e-9)
        told = f"training waited {self.seconds:.1f} s for images, videos and audio, {share:.0%} of its time"
        if not self.is_notable(total_seconds):
            return told
        needed = self.workers_needed(total_seconds, num_workers)
        return f"{told} -> dataloader_num_workers: {needed:,} would have been enough, with a core for each"
