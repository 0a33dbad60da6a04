"""How long training waits for its batches, whose images are opened and resized while they are made."""

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

    def remark(self, total_seconds: float, num_workers: int) -> str:
        """For the log, of a training with images that took `total_seconds`."""
        share = self.seconds / max(total_seconds, 1e-9)
        told = f"training waited {self.seconds:.1f} s for images, {share:.0%} of its time"
        if share < NOTABLE_SHARE or self.seconds < NOTABLE_SECONDS:
            return told
        more = "a larger dataloader_num_workers makes" if num_workers else "dataloader_num_workers: 2 or more makes"
        return f"{told} -> {more} batches while the model computes"
