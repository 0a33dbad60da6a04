"""Steps whose update is left out, since their loss or gradient is NaN or infinite (`on_nonfinite: skip`, `rollback`).

Such a step is a step like any other for its number, the learning rate schedule and the order of the rows, so a run
resumes after it as after any other. Weights, optimizer and the state of the stage stay as they were before the step;
with `rollback` they are those of the last checkpoint. The latter leaves out all steps since that checkpoint, as PaLM
did at loss spikes (https://arxiv.org/abs/2204.02311, section 5.1).
"""

from typing import Any, Literal

KEY = "nonfinite_steps"
"""In the log, and in `stateful_callbacks` of trainer_state.json: how many there were since the run began."""


class LeftOut:
    """Counts the steps between two lines of the log, so that means are those of the steps that count."""

    def __init__(self, action: Literal["stop", "skip", "rollback"], limit: int) -> None:
        self.action, self.limit = action, limit
        self.here = 0
        """Since this process began."""
        self.since_log = {True: 0, False: 0}
        """Whether the update of the step was left out -> steps."""

    def count(self, *, is_left_out: bool) -> None:
        self.since_log[is_left_out] += 1
        self.here += is_left_out

    def correct_line(self, logs: dict[str, float], total: int) -> None:
        """transformers divides the loss since the last line by all steps; if none of them counts, there is no loss."""
        updates, left_out = self.since_log[False], self.since_log[True]
        self.since_log = {True: 0, False: 0}
        if left_out and updates:
            logs["loss"] *= (updates + left_out) / updates
        elif left_out:
            del logs["loss"]
        if total:
            logs[KEY] = total

    def correct_end(self, logs: dict[str, Any], num_steps: int, total: int) -> None:
        """`num_steps`: over which the loss is a mean. `total`: how many of them were left out."""
        if total:
            logs["train_loss"] *= num_steps / max(num_steps - total, 1)
            logs[f"train_{KEY}"] = total
