"""Loss spikes are reported, with the rows of their step; whether to act on one is up to the user.

A spike is a loss above all of the last steps and more than `NUM_DEVIATIONS` standard deviations above their mean.
"""

from collections import deque
from statistics import fmean, pstdev

WINDOW_STEPS = 64
LEAST_STEPS = 16
"""With fewer it is not known how much a loss varies; a resumed run counts them from the start."""
NUM_DEVIATIONS = 6.0


class Spikes:
    """Keeps the losses of the last steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def remark(self, loss: float) -> str:
        """What is said about the finite loss of the next step; nothing if it is no spike."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < LEAST_STEPS or loss <= max(before):
            return ""
        mean, deviation = fmean(before), pstdev(before)
        if loss - mean <= NUM_DEVIATIONS * deviation:
            return ""
        return f"the loss rose to {loss:.4g}, after {mean:.4g} ± {deviation:.2g} in the {len(before)} steps before"
