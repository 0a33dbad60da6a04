"""Schedule-free optimizers step on one point and learn another, an average (https://arxiv.org/abs/2405.15682).

The average is what is evaluated and saved. `optimizer.eval()` puts it into the weights, `optimizer.train()` puts the
point of the steps back; transformers calls the latter before each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Inside, the weights are the average. Nothing happens with another optimizer, or if they are it already."""
    if not _is_between_steps(optimizer):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def leave_averaged(optimizer: Any) -> None:
    """From now on the weights are the average: no step follows."""
    if _is_between_steps(optimizer):
        optimizer.eval()


def _is_between_steps(optimizer: Any) -> bool:
    return any(group.get("train_mode") for group in getattr(optimizer, "param_groups", ()))
