"""A step of one of Luthier's own optimizers on tensors without data: what it holds, and what it computes.

The real optimizer is built for the model on PyTorch's `meta` device and steps there, so what is counted is what its
code does: moments and projections, and tensors that are there for a moment, as those of a Newton-Schulz iteration.
"""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from luthier.core.kinds import OPTIMIZERS
from luthier.workflow.plan.calls import Call, Calls
from luthier.workflow.plan.counter import StepCounter

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from luthier.config.runs import TrainRun
    from luthier.training.optimizers import Optimizer, Phase

_READ = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed")
"""What optimizers read of transformers' TrainingArguments."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an optimizer holds and does in one kind of steps."""

    phase: "Phase"
    states_bytes: int
    gradients_bytes: int
    """The most that are there at the same time."""
    more_bytes: int
    """The most beside weights, gradients and states. 0 if it steps in the backward pass, whose trace counts it."""
    calls: Calls
    """Of one step."""


def own_optimizer(run: "TrainRun") -> "tuple[Optimizer, Any] | None":
    """The optimizer of Luthier that has a state of its own kind, and its keys; None for an optimizer of `optim`."""
    for name, config in run.optimizers.items():
        optimizer: Optimizer = OPTIMIZERS.get(name)
        if optimizer.has_own_state:
            return optimizer, config
    return None


def arguments_of(run: "TrainRun") -> Any:
    return SimpleNamespace(**{name: run.training[name] for name in _READ})


def updates_of(run: "TrainRun", model: "nn.Module", num_steps: int) -> Sequence[Update]:
    """One for each kind of steps; () for an optimizer of `optim`. `model`: on the `meta` device; it stays as it is."""
    found = own_optimizer(run)
    if found is None:
        return ()
    optimizer, config = found
    args = arguments_of(run)
    frees = optimizer.frees_gradients(config)
    return [
        _update(optimizer, deepcopy(model), args, phase, frees=frees)
        for phase in optimizer.phases(model, args, config, num_steps)
    ]


def _update(optimizer: "Optimizer", model: "nn.Module", args: Any, phase: "Phase", *, frees: bool) -> Update:
    counter = StepCounter(model)
    with counter:
        built = optimizer.build(model, args, phase.config)
        more, calls = step_twice(built, model, counter)
    gradients = [weight.nbytes for weight in model.parameters() if weight.requires_grad]
    return Update(
        phase,
        states_bytes=counter.live_bytes,
        gradients_bytes=max(gradients) if frees else sum(gradients),
        more_bytes=0 if frees else more,
        calls=calls,
    )


def step_twice(optimizer: "TorchOptimizer", model: "nn.Module", counter: StepCounter) -> tuple[int, Calls]:
    """(most bytes beside weights, gradients and states, operations) of the second step, whose states are there."""
    import torch

    more, calls = 0, Counter[Call]()
    for _ in range(2):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        counter.restart()
        optimizer.step()
        more, calls = max(counter.history, default=0) - counter.live_bytes, counter.calls
        for weight in weights:
            weight.grad = None
    return max(more, 0), calls
