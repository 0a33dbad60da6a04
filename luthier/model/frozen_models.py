"""Models beside the policy that a loss runs and that are not trained: a teacher, a reference.

A reference that no key names is the policy as training began. Its weights are not held twice: only the trainable ones
are kept as they were, and are swapped in while the model runs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from luthier.model.sharded import exchange, is_sharded, reshard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.model.heads.output_head import OutputHead


class FrozenModel(Protocol):
    """A model that a loss can run."""

    @property
    def head(self) -> "OutputHead": ...

    def running(self) -> "AbstractContextManager[nn.Module]":
        """While open, gives the model, in evaluation mode and without gradients."""
        ...


@dataclass(frozen=True, slots=True)
class SeparateModel:
    """A model of its own."""

    model: "nn.Module"
    head: "OutputHead"

    @contextmanager
    def running(self) -> "Iterator[nn.Module]":
        import torch

        with torch.no_grad():
            yield self.model


@dataclass(frozen=True, slots=True)
class InitialPolicy:
    """The policy with the weights that training began with."""

    policy: "nn.Module"
    head: "OutputHead"
    initial: "dict[str, Tensor]"
    """Those of the trainable parameters."""

    @classmethod
    def of(cls, policy: "nn.Module", head: "OutputHead") -> "InitialPolicy":
        """Remembers the weights as they are now."""
        trainable = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        return cls(policy, head, {name: weight.detach().clone() for name, weight in trainable.items()})

    @contextmanager
    def running(self) -> "Iterator[nn.Module]":
        import torch

        was_training = self.policy.training
        self.policy.eval()
        self._swap()
        try:
            with torch.no_grad():
                yield self.policy
        finally:
            self._swap()
            self.policy.train(was_training)

    def _swap(self) -> None:
        """The current and the initial weights change places; only pointers move, except in sharded weights."""
        import torch

        are_shards = is_sharded(self.policy)
        reshard(self.policy)
        weights = dict(self.policy.named_parameters())
        for name, other in self.initial.items():
            weight = weights[name]
            if are_shards:
                self.initial[name] = exchange(weight, other)
            else:
                self.initial[name], weight.data = weight.data, other.to(weight.device)
        # Autocast caches 16-bit copies of weights by their address.
        torch.clear_autocast_cache()
