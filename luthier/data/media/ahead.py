"""Measures media in threads, ahead of the rows that show them. Decoding releases the GIL."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from luthier.core.errors import RowError
from luthier.core.machine import num_cpus

MAX_THREADS = 16
ROWS_PER_THREAD = 16
"""Rows whose items are measured before the first of them is used."""
TASK_ROWS, TASK_SECONDS = 8, 0.01
"""Rows of small files share a task, since to wait for a thread takes as long as to read such a file."""

Row = TypeVar("Row")
Result = TypeVar("Result")


def measured_ahead(
    rows: Iterable[Row], items_of: Callable[[Row], Sequence[str]], measure: Callable[[str], Result]
) -> Iterator[tuple[Row, list[Result | RowError]]]:
    """The rows in order, each with what `measure` returns for its items, or the `RowError` that it raises.

    An item that several of the waiting rows show is measured once. After an interrupt, only the files that are being
    read are finished.
    """
    num_threads = min(MAX_THREADS, num_cpus())
    known: WeakValueDictionary[str, _Found[Result]] = WeakValueDictionary()
    waiting: deque[_Task[Row, Result]] = deque()
    num_waiting, task_rows = 0, 1
    task: _Task[Row, Result] = _Task()
    threads, stop = ThreadPoolExecutor(num_threads), Event()
    try:
        for row in rows:
            task.add(row, items_of(row), known)
            if len(task.rows) < task_rows:
                continue
            task.start(threads, measure, stop)
            waiting.append(task)
            num_waiting += len(task.rows)
            task = _Task()
            while num_waiting > num_threads * ROWS_PER_THREAD:
                done = waiting.popleft()
                num_waiting -= len(done.rows)
                seconds = done.wait() / len(done.rows)
                task_rows = TASK_ROWS if seconds * TASK_ROWS < TASK_SECONDS else max(1, int(TASK_SECONDS / seconds))
                yield from done.results()
        task.start(threads, measure, stop)
        for done in (*waiting, task):
            done.wait()
            yield from done.results()
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


@dataclass(slots=True, weakref_slot=True)
class _Found(Generic[Result]):
    item: str
    results: list[Result | RowError] = field(default_factory=list)
    """One, once the item has been measured."""


@dataclass(slots=True)
class _Task(Generic[Row, Result]):
    """Rows whose items one thread measures."""

    rows: list[tuple[Row, list[_Found[Result]]]] = field(default_factory=list)
    new: list[_Found[Result]] = field(default_factory=list)
    """The items that no task before this one has."""
    seconds: Future[float] | None = None

    def add(self, row: Row, items: Sequence[str], known: "WeakValueDictionary[str, _Found[Result]]") -> None:
        own = []
        for item in items:
            found = known.get(item)
            if found is None:
                found = known[item] = _Found(item)
                self.new.append(found)
            own.append(found)
        self.rows.append((row, own))

    def start(self, threads: ThreadPoolExecutor, measure: Callable[[str], Result], stop: Event) -> None:
        if self.new:
            self.seconds = threads.submit(_measure, measure, self.new, stop)

    def wait(self) -> float:
        """The seconds that it took."""
        return 0.0 if self.seconds is None else self.seconds.result()

    def results(self) -> Iterator[tuple[Row, list[Result | RowError]]]:
        """Called after those of all tasks before it, to which some of its items may belong."""
        for row, own in self.rows:
            yield row, [result for found in own for result in found.results]


def _measure(measure: Callable[[str], Result], new: Sequence[_Found[Result]], stop: Event) -> float:
    begin = time.perf_counter()
    for found in new:
        if stop.is_set():
            break
        try:
            found.results.append(measure(found.item))
        except RowError as fault:
            found.results.append(fault)
    return time.perf_counter() - begin
