"""Several optimizers as one, and fused backward: one optimizer per parameter that steps during the backward pass.

Fused backward (LOMO, https://arxiv.org/abs/2306.09782): the gradient of a parameter is used and freed as soon as it is
computed, so the gradients of the whole model are never in memory together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Optimizers of different parameters; a learning rate schedule sees the groups of all of them."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        defaults = {"lr": parts[0].defaults["lr"]}  # some schedules end at a share of it
        super().__init__([group for part in parts for group in part.param_groups], defaults)
        self.parts = list(parts)

    def step(self, closure: Any = None) -> Any:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def step_in_backward(
    groups: Sequence[dict[str, Any]], build: Callable[[list[dict[str, Any]]], Optimizer]
) -> CombinedOptimizer:
    """One optimizer per parameter, which steps as soon as the gradient is computed and then frees it.

    The `step` of the combined optimizer finds no gradients and does nothing. Anything that needs all gradients at
    once, such as clipping by the global norm, finds none either.
    """
    parts = []
    for group in groups:
        for parameter in group["params"]:
            part = build([{**group, "params": [parameter]}])
            parts.append(part)

            def update(parameter: torch.Tensor, part: Optimizer = part) -> None:
                part.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(update)
    return CombinedOptimizer(parts)
