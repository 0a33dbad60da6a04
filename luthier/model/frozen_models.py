"""Networks that a loss asks beside the policy, and that do not learn: a teacher, a reference.

A reference that no key names is the policy as training began. Its weights need not be held twice: only those that
learn are kept as they were, and lie in the model's place while it is asked.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.model.heads.output_head import OutputHead


class Companion(Protocol):
    """A model that can be asked."""

    @property
    def head(self) -> "OutputHead": ...

    def asked(self) -> "AbstractContextManager[nn.Module]":
        """While open, gives the model, in evaluation mode and without gradients."""
        ...


@dataclass(frozen=True, slots=True)
class OtherModel:
    """A model of its own."""

    model: "nn.Module"
    head: "OutputHead"

    @contextmanager
    def asked(self) -> "Iterator[nn.Module]":
        import torch

        with torch.no_grad():
            yield self.model


@dataclass(frozen=True, slots=True)
class PolicyAtStart:
    """The policy with the weights that training began with."""

    policy: "nn.Module"
    head: "OutputHead"
    initial: "dict[str, Tensor]"
    """Those of the parameters that learn."""

    @classmethod
    def of(cls, policy: "nn.Module", head: "OutputHead") -> "PolicyAtStart":
        """Remembers the weights as they are now."""
        learning = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        return cls(policy, head, {name: weight.detach().clone() for name, weight in learning.items()})

    @contextmanager
    def asked(self) -> "Iterator[nn.Module]":
        import torch

        was_training = self.policy.training
        self.policy.eval()
        self._exchange()
        try:
            with torch.no_grad():
                yield self.policy
        finally:
            self._exchange()
            self.policy.train(was_training)

    def _exchange(self) -> None:
        """What learns and what it was change places; only pointers move."""
        import torch

        weights = dict(self.policy.named_parameters())
        for name, other in self.initial.items():
            weight = weights[name]
            self.initial[name], weight.data = weight.data, other.to(weight.device)
        # Autocast keeps 16-bit copies of weights by where they lie.
        torch.clear_autocast_cache()
