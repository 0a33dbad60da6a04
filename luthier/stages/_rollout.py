"""Learning from the model's own answers: what a stage says of it, and what it is given.

One *rollout* is a set of prompts, the answers that the policy gives them, and their scores. The trainer makes it, the
stage says how far each token was better than expected (its advantage), and the optimizer steps that follow learn from
it. A stage may leave scores out, or take given answers for a share of the rollouts. B answers, K tokens of all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luthier.stages import StageState, Sums

if TYPE_CHECKING:
    from torch import Tensor

Totals = Callable[[Sums], Mapping[str, tuple[float, float]]]
"""name -> (sum, count) of this process becomes that of all processes."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One rollout with its scores. Answers to one prompt stand together."""

    scores: "Tensor"
    """(B,) what the answers are worth."""
    stopped: "Tensor"
    """(B,) whether the answer came to its end by itself."""
    rows: "Tensor"
    """(K,) the answer that each token stands in, ascending."""
    logps: "Tensor | None"
    """(K,) log-probability of each token when it was written; None where nobody `asks_policy`."""
    reference: "Tensor | None"
    """(K,) log-probability of each token for the reference model."""
    values: "Tensor | None"
    """(K,) what the value head expected before each token."""

    @property
    def lengths(self) -> "Tensor":
        """(B,) tokens of each answer, the one that ended it included."""
        import torch

        return torch.bincount(self.rows, minlength=len(self.scores))

    def summed(self, values: "Tensor") -> "Tensor":
        """(K,) -> (B,)."""
        return values.new_zeros(len(self.scores)).index_add(0, self.rows, values)


@dataclass(frozen=True, slots=True)
class RolloutTargets:
    """What the loss is computed from."""

    columns: "Mapping[str, Tensor]"
    """Name in the batch -> (K,)."""
    units: "Tensor"
    """(B,) by how many units each answer counts in what the loss of an optimizer step is divided by."""
    state: StageState
    metrics: Sums = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a stage learns from its own answers. It is part of a `Stage`."""

    num_generations: int = 1
    """Answers to each prompt."""
    num_batches: int = 1
    """Optimizer steps' worth of answers made at a time."""
    num_passes: int = 1
    """How often each answer is learned from."""
    own_share: float = 1.0
    """Share of the rollouts with answers of the model's own; in the others stand the answers that the data give."""
    asks_policy: bool = True
    """Whether the log-probabilities of the policy are asked for before it learns, which costs a forward pass."""
    has_values: bool = False
    """Whether a value head learns beside the policy."""
    advantages: Callable[..., RolloutTargets] | None = None
    """(experience, config, *, state, totals, max_new_tokens) -> RolloutTargets. None: nobody scores the answers, and
    the loss takes their tokens as they stand."""
