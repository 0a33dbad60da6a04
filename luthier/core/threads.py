"""Threads for work that computes on a CPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, from a thread that ends with it.

    OpenMP gives each thread that computes helpers of its own, and keeps them as long as this thread lives. When all
    helpers together are more than the processors, they sleep between two operations instead of waiting awake: on two
    cores an operation then begins after 50 us instead of 4. So what the main thread has done once, such as to load a
    model, would slow down the thread that answers.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
