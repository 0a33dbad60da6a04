"""Training on sampled answers: what a stage declares about its rollouts, and what it receives.

A *rollout* is a set of prompts, the answers that the policy samples for them, and their scores. The trainer collects
it, the stage computes the advantage of each token, and the next optimizer steps train on it. A stage may do without
scores, or use the answers of the dataset in a share of the rollouts. B answers, K tokens in total.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luthier.stages import StageState, Sums
from luthier.stages._segments import counted, summed

if TYPE_CHECKING:
    from torch import Tensor

Totals = Callable[[Sums], Mapping[str, tuple[float, float]]]
"""name -> (sum, count) of this process; returns those over all processes."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One rollout with its scores. Answers to the same prompt are adjacent."""

    scores: "Tensor"
    """(B,) the score of each answer."""
    rows: "Tensor"
    """(K,) index of the answer that each token belongs to, ascending."""
    logps: "Tensor | None"
    """(K,) log-probability of each token when it was sampled; None without `needs_policy_logps`."""
    reference: "Tensor | None"
    """(K,) log-probability of each token under the reference model."""
    values: "Tensor | None"
    """(K,) value estimate before each token."""

    @property
    def lengths(self) -> "Tensor":
        """(B,) number of tokens of each answer, stop token included."""
        return counted(self.rows, len(self.scores))

    def summed(self, values: "Tensor") -> "Tensor":
        """(K,) -> (B,)."""
        return summed(values, self.rows, len(self.scores))


@dataclass(frozen=True, slots=True)
class RolloutTargets:
    """What the loss is computed from."""

    columns: "Mapping[str, Tensor]"
    """Batch key -> (K,)."""
    units: "Tensor"
    """(B,) what each answer adds to the divisor of the loss of its optimizer step."""
    state: StageState
    metrics: Sums = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a stage samples answers and trains on them; part of a `Stage`."""

    num_generations: int = 1
    """Answers per prompt."""
    num_batches: int = 1
    """Optimizer steps' worth of answers sampled at a time."""
    num_passes: int = 1
    """Passes over each set of answers."""
    sampled_share: float = 1.0
    """Share of the rollouts with sampled answers; the others use the answers of the dataset."""
    needs_policy_logps: bool = True
    """Whether the policy's log-probabilities are computed before the update, which costs a forward pass."""
    has_values: bool = False
    """Whether a value head is trained with the policy."""
    advantages: Callable[..., RolloutTargets] | None = None
    """(experience, config, *, state, totals, max_new_tokens) -> RolloutTargets. None: answers are not scored, and the
    loss uses their tokens directly."""
