"""A rollout of two answers, in one process, for the advantages of ppo and grpo."""

from typing import Any

import torch

from luthier.stages._rollout import Experience


def alone(sums: Any) -> dict[str, tuple[float, float]]:
    """The totals of one process."""
    return {name: (float(total), count) for name, (total, count) in sums.items()}


def experience(reference: float | None = None, values: float | None = None) -> Experience:
    """Two answers of two and one tokens with the scores 1 and 3."""
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    return Experience(
        scores=torch.tensor([1.0, 3.0], dtype=torch.float64),
        rows=torch.tensor([0, 0, 1]),
        logps=logps,
        reference=None if reference is None else logps - reference,
        values=None if values is None else torch.full((3,), values, dtype=torch.float64),
    )
