"""Settings of the optimizer that a resumed run takes from its checkpoint, whatever its own keys say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from luthier.core.log import warn

KEYS = {
    "initial_lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1, adam_beta2",
    "eps": "adam_epsilon",
}
"""Setting of a parameter group -> the keys that it comes from."""
BY_SCHEDULE = {"initial_lr"}
"""What some schedules add to a parameter group, and others do not."""


@contextmanager
def telling_kept_settings(optimizer: Any, checkpoint: str | None) -> Iterator[None]:
    """A context in which the optimizer loads its state from a checkpoint, and its settings with it.

    Afterwards it warns of settings that this has replaced by others. Raises `ValueError` if settings of this optimizer
    are not among them, since another one saved the state: its first step would look for them.
    """
    if checkpoint is None:
        yield
        return
    asked = [_settings(group) for group in optimizer.param_groups]
    names = [set(group) for group in optimizer.param_groups]
    yield
    for before, group in zip(names, optimizer.param_groups, strict=True):
        if lost := sorted(before - group.keys() - BY_SCHEDULE):
            raise ValueError(f"mismatch of the optimizer: another one saved its state, without {', '.join(lost)}")
    kept = [_settings(group) for group in optimizer.param_groups]
    for name, key in KEYS.items():
        pairs = [(before[name], after[name]) for before, after in zip(asked, kept, strict=True)
                 if name in before and name in after]  # fmt: skip
        found = next(((before, after) for before, after in pairs if before != after), None)
        if found is not None:
            before, after = found
            warn(
                f"{key}: {before}: is not followed: training continues from {checkpoint} with {after} -> to train on"
                " with another value, start a run of its own from that model or adapter"
            )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    named = {name: group[name] for name in KEYS if name in group}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
