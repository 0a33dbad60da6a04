"""The steps of APOLLO; the equations stand in `luthier.training.optimizers.apollo`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from luthier.training.optimizers._low_rank import project, random_vectors, sides_of, singular_vectors
from luthier.training.optimizers._seeds import seed_from

MAX_GROWTH = 1.01
"""How much longer an update may be than the one before."""
TINY = 1e-8


class Apollo(Optimizer):
    """AdamW, but for the groups with `projected`, whose gradients are scaled and not replaced."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        numbers: Mapping[torch.nn.Parameter, int],
        seed: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rank: int,
        update_interval: int,
        scale: float,
        is_random: bool,
        proj_type: str,
        by_channel: bool,
        scales_first: bool,
    ) -> None:
        """`numbers`: index of each weight; with `seed` it seeds the weight's random projections."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "projected": False}
        super().__init__(list(groups), defaults)
        self.numbers, self.seed = numbers, seed
        self.rank, self.update_interval, self.scale = rank, update_interval, scale
        self.is_random, self.proj_type = is_random, proj_type
        self.by_channel, self.scales_first = by_channel, scales_first

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update = (
                        self._scaled(weight, group) if group["projected"] else self._adam(weight, weight.grad, group)
                    )
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(group["lr"]))

    def _adam(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """m^ / (sqrt(v^) + eps)"""
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if "exp_avg" not in state:
            state["num_steps"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["num_steps"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** state["num_steps"])
        size = (state["exp_avg_sq"] / (1 - beta2 ** state["num_steps"])).sqrt_().add_(group["eps"])
        return mean.div_(size)  # in place, as the embedding may be large

    def _scaled(self, weight: torch.nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        sides = sides_of(weight.shape, self.proj_type)
        turn, rest = divmod(state.get("num_steps", 0), self.update_interval)
        if rest == 0:
            state["left"], state["right"] = (
                random_vectors(gradient, self.rank, sides, seed_from(self.seed, self.numbers[weight], turn))
                if self.is_random
                else singular_vectors(gradient, self.rank, sides)
            )
        low = project(gradient, state["left"], state["right"])
        adapted = self._adam(weight, low, group)
        # The side that is kept has the channels: columns if the rows were projected, else rows.
        across: Any = (0 if sides[0] else 1) if self.by_channel else (0, 1)
        factors = adapted.norm(dim=across, keepdim=True) / (low.norm(dim=across, keepdim=True) + TINY)
        update = gradient * factors
        if self.scales_first:
            update.mul_(self.scale**0.5)
        length = update.norm()
        if "length" in state:
            limiter = (length / (state["length"] + TINY)).clamp(min=MAX_GROWTH) / MAX_GROWTH
            update.div_(limiter)
            length = length / limiter
        state["length"] = length
        return update if self.scales_first else update.mul_(self.scale**0.5)
