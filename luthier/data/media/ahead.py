"""Measures images in threads, ahead of the rows that show them. Decoding releases the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from luthier.core.errors import RowError
from luthier.data.media.reader import size_of

MAX_THREADS = 16
ROWS_PER_THREAD = 16
"""Rows whose images are measured before the first of them is used."""

Row = TypeVar("Row")


def measured_ahead(rows: Iterable[Row], images_of: Callable[[Row], Sequence[str]]) -> Iterator[Row]:
    """The rows in order, each after `size_of` has been asked for all its images. Files that hold none are left to the
    caller, who asks again. After an interrupt, only the images that are being read are finished."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[Row, list[Future[None]]]] = deque()
    threads = ThreadPoolExecutor(num_threads)
    try:
        for row in rows:
            waiting.append((row, [threads.submit(_measure, path) for path in images_of(row)]))
            if len(waiting) > num_threads * ROWS_PER_THREAD:
                yield _measured(waiting)
        while waiting:
            yield _measured(waiting)
    finally:
        threads.shutdown(cancel_futures=True)


def _measured(waiting: "deque[tuple[Row, list[Future[None]]]]") -> Row:
    row, sizes = waiting.popleft()
    for size in sizes:
        size.result()
    return row


def _measure(path: str) -> None:
    try:
        size_of(path)
    except RowError:
        return
