"""Threads for work that computes on a CPU or waits, and that nothing waits for once a signal ends the command."""

from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
NOTICE_SECONDS = 0.5
"""How long to wait at a time: a signal that comes just before a wait does not end it, and is noticed afterwards."""


def in_own_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, from a thread that ends with it; see `outcome_of`.

    OpenMP gives each thread that computes helpers of its own, and keeps them as long as this thread lives. When all
    helpers together are more than the processors, they sleep between two operations instead of waiting awake: on two
    cores an operation then begins after 50 us instead of 4. So what the main thread has done once, such as to load a
    model, would slow down the thread that answers.
    """
    outcome = outcome_of(work)
    if outcome.fault is not None:
        raise outcome.fault
    return outcome.value


def outcome_of(work: Callable[[], T]) -> "Outcome[T]":
    """What `work` returns or raises in a thread of its own, which has the handlers of no signal.

    A signal interrupts the waiting for it. The thread does not keep the process from ending.
    """
    outcome: Outcome[T] = Outcome()

    def run() -> None:
        with outcome:
            outcome.values.append(work())

    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(NOTICE_SECONDS)
    return outcome


def all_in_threads(works: Sequence[Callable[[], T]], num_threads: int) -> list[T]:
    """What each of `works` returns, in their order; `num_threads` of them run at the same time.

    Raises the first fault. Neither then nor after a signal does it wait for work that has begun, and the threads do not
    keep the process from ending, as those of an executor do.
    """
    waiting, ended = deque(enumerate(works)), SimpleQueue[tuple[int, Outcome[T]]]()

    def run() -> None:
        while waiting:
            try:
                number, work = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            outcome: Outcome[T] = Outcome()
            with outcome:
                outcome.values.append(work())
            ended.put((number, outcome))

    for _ in range(min(num_threads, len(works))):
        Thread(target=run, daemon=True).start()
    found: dict[int, T] = {}
    try:
        while len(found) < len(works):
            try:
                number, outcome = ended.get(timeout=NOTICE_SECONDS)
            except Empty:
                continue
            if outcome.fault is not None:
                raise outcome.fault
            found[number] = outcome.value
    finally:
        waiting.clear()
    return [found[number] for number in range(len(works))]


class Outcome(Generic[T]):
    """What a thread has returned, or raised: its block keeps that."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self.fault: BaseException | None = None

    @property
    def value(self) -> T:
        return self.values[0]

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.fault = fault
        return True
