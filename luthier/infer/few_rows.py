"""The vocabulary head of a model on a CPU, for the few rows of a step that several answers share.

MKL takes longer for 3 to 15 rows times a wide weight than for 16: 15 to 20 ms against 13 to 16 for 8 rows of SmolLM2's
head (49,152 x 576, float32, 2 cores), which is the largest product of a step. Rows of zeros fill up the product.
R rows, D width, V vocabulary.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL = 16
"""Rows."""
FEWEST = 3
MIN_VOCABULARY = 8192
"""Narrower weights gain nothing."""


def fill_head(model: "PreTrainedModel") -> None:
    """Let the head of a float32 model on a CPU compute with at least 16 rows where there are at least 3."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.device.type != "cpu" or head.weight.dtype is not torch.float32:
        return
    if head.out_features >= MIN_VOCABULARY:
        head.forward = partial(_logits, head)  # type: ignore[method-assign]


def _logits(head: nn.Linear, states: Tensor) -> Tensor:
    """(..., D) -> (..., V)"""
    rows = states.flatten(0, -2)
    missing = FULL - len(rows)
    if not 0 < missing <= FULL - FEWEST:
        return functional.linear(states, head.weight, head.bias)
    logits = functional.linear(functional.pad(rows, (0, 0, 0, missing)), head.weight, head.bias)
    return logits[: len(rows)].view(*states.shape[:-1], head.out_features)
