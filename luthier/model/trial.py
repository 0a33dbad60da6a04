"""Trying a model on a few tokens, as it computes while training, to find out what it can do."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from luthier.model.classes import gives_scores
from luthier.model.dtype import autocast_of_training, half_of
from luthier.model.heads.score_head import position_scores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def are_close(base: "PreTrainedModel", found: "Tensor", expected: "Tensor") -> bool:
    """Within the rounding of the format that the model computes in, which its output may not have."""
    import torch

    tolerance = max(8 * torch.finfo(half_of(base) or found.dtype).eps, 1e-4)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@contextlib.contextmanager
def trying(base: "PreTrainedModel") -> Iterator[None]:
    """A context in which the model computes as in training, without dropout and gradients."""
    import torch

    with _evaluating(base), _rounding_token_by_token(base), torch.no_grad(), autocast_of_training(base):
        yield


def outputs(base: "PreTrainedModel", inputs: Mapping[str, Any]) -> "Tensor":
    """(B T, V) logits, or the (B T,) scores of a reward model."""
    if gives_scores(base.config):
        return position_scores(base, inputs)
    logits: Tensor = base(**inputs, use_cache=False).logits.flatten(0, 1)
    return logits


@contextlib.contextmanager
def _evaluating(model: "nn.Module") -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _rounding_token_by_token(model: "nn.Module") -> Iterator[None]:
    """8-bit layers of bitsandbytes without their treatment of large inputs (section 3.2 of LLM.int8()).

    They multiply the columns that are large in any token apart, for all tokens of a batch. So how a token is rounded
    depends on all others, in padded batches as well, and would hide what the attention does. Without it each token is
    rounded by its own largest number.
    """
    # An adapter around such a layer has the same name, and no state.
    states: list[Any] = [
        module.state
        for module in model.modules()
        if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state")
    ]
    kept = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, kept, strict=True):
            state.threshold = threshold
