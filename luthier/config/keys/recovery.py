"""The keys that say what a training run does when a step or the machine fails it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is NaN or infinite ends the run, or the update of its step is left out, or the weights
    and the optimizer go back to the last checkpoint; training continues with the rows after that step."""
    max_nonfinite_steps: int = 10
    """How many such steps a run may leave out or go back from before it stops."""
    save_on_signal_seconds: float | None = None
    """How many seconds after a signal the checkpoint must be complete. A step or an evaluation that would take longer
    is abandoned. By default the step is finished first."""
