"""Measures media in threads, ahead of the rows that show them. Decoding releases the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from luthier.core.errors import RowError

MAX_THREADS = 16
ROWS_PER_THREAD = 16
"""Rows whose items are measured before the first of them is used."""

Row = TypeVar("Row")


def measured_ahead(
    rows: Iterable[Row], items_of: Callable[[Row], Sequence[str]], measure: Callable[[str], object]
) -> Iterator[Row]:
    """The rows in order, each after `measure` has been called for all its items. Files that cannot be read are left to
    the caller, who asks again. After an interrupt, only the files that are being read are finished."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[Row, list[Future[None]]]] = deque()
    threads = ThreadPoolExecutor(num_threads)
    try:
        for row in rows:
            waiting.append((row, [threads.submit(_measure, measure, item) for item in items_of(row)]))
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


def _measure(measure: Callable[[str], object], item: str) -> None:
    try:
        measure(item)
    except RowError:
        return
