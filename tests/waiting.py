"""Waiting for something that another thread or process does."""

import time
from collections.abc import Callable
from typing import Any


def until(
    is_so: Callable[[], Any],
    otherwise: str | Callable[[], str] = "it did not become true",
    *,
    seconds: float = 300.0,
    pause_seconds: float = 0.02,
) -> Any:
    """What `is_so` gives as soon as it is true.

    It is asked once more when the time is over: a busy machine may stop this process for longer than that. `otherwise`:
    what the failure says.
    """
    end = time.monotonic() + seconds
    while True:
        is_over = time.monotonic() >= end
        if result := is_so():
            return result
        assert not is_over, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(pause_seconds)
