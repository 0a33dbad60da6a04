"""The steps of Adam-mini; the equations are in `luthier.training.optimizers.adam_mini`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class AdamMini(Optimizer):
    """Each group has a `block`: the number of rows that share a second moment, or `whole` for all of a weight."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        state, grad = self.state[weight], weight.grad
        assert grad is not None
        squares = in_blocks(grad, group["block"]).square().mean(1)
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(squares)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(squares, 1 - beta2)
        mean = in_blocks(state["exp_avg"] / (1 - beta1 ** state["step"]), group["block"])
        size = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        update = mean.div_(size[:, None]).mul_(lr)  # in place, as the embedding may be large
        weight.mul_(1 - lr * group["weight_decay"]).sub_(update.view_as(weight))


def in_blocks(values: torch.Tensor, block: str | int) -> torch.Tensor:
    """Reshaped to (blocks, weights per block)."""
    if block == "whole":
        return values.reshape(1, -1)
    assert isinstance(block, int)
    return values.reshape(-1, block * values.shape[-1])
