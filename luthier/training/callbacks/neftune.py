"""NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings during training.

    x~ = x + alpha / sqrt(L d) * eps,    eps uniform in [-1, 1], for a sequence of L tokens and embeddings of size d

L is the length of each single sequence, so the noise does not depend on what it is batched or packed with.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from luthier.model.lengths import sequence_lengths
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class NeftuneNoise(TrainerCallback):
    """Adds noise during training, whenever the embeddings are in training mode."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: Tensor | None = None
        self.handles: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attach(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def attach(self, model: "nn.Module") -> None:
        base = unwrap(model)
        self.handles = [
            base.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            base.get_input_embeddings().register_forward_hook(self._add_noise),
        ]

    def _see_inputs(self, module: "nn.Module", args: Any, kwargs: dict[str, Any]) -> None:
        self.lengths = sequence_lengths(kwargs)

    def _add_noise(self, module: "nn.Module", args: Any, embedded: "Tensor") -> "Tensor":
        if not module.training:
            return embedded
        assert self.lengths is not None, "the model has seen its inputs"
        size = self.alpha / (self.lengths.clamp(min=1) * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * size[..., None].to(embedded.dtype)
