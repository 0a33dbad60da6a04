"""bitsandbytes 0.50: which weights have states of 32 bits is remembered for the process, not for the optimizer.

transformers asks for states of 32 bits for embeddings. The manager of bitsandbytes notes the embeddings themselves and
where their weights stand in the groups of the optimizer. The next 8-bit optimizer of the process then gives 32 bits
to whatever weight stands there, and the embeddings of the first model stay in memory.
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/optimizer.py `GlobalOptimManager`
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def forgetting_overrides() -> Iterator[None]:
    """Wraps a run: nothing that another optimizer of this process asked for counts in it."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    optim: Any = sys.modules.get("bitsandbytes.optim")
    if optim is not None:
        optim.GlobalOptimManager.get_instance().initialize()
