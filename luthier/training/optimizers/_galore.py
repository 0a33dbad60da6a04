"""The steps of GaLore; the equations are in `luthier.training.optimizers.galore`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from luthier.training.optimizers._low_rank import low_shape, project, project_back, sides_of, singular_vectors


class GaLore(Optimizer):
    """An inner optimizer steps on low-rank proxies, which are zero before each step; their values are projected back.

    Groups with `projected` have proxies; the weights of other groups are passed to `build_inner` themselves.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        build_inner: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        lr: float,
        rank: int,
        update_interval: int,
        scale: float,
        proj_type: str,
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0, "projected": False})
        self.rank, self.update_interval, self.scale, self.proj_type = rank, update_interval, scale, proj_type
        self.inner = build_inner(
            [
                {"params": [self._stand_in(weight) if group["projected"] else weight for weight in group["params"]]}
                | {"weight_decay": group["weight_decay"]}
                for group in self.param_groups
            ]
        )

    def _stand_in(self, weight: torch.Tensor) -> torch.nn.Parameter:
        sides = sides_of(weight.shape, self.proj_type)
        return torch.nn.Parameter(weight.new_zeros(low_shape(weight.shape, self.rank, sides)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = list(zip(self.param_groups, self.inner.param_groups, strict=True))
        for group, inner_group in groups:
            inner_group["lr"] = group["lr"]
            if group["projected"]:
                for weight, stand_in in zip(group["params"], inner_group["params"], strict=True):
                    stand_in.grad = None if weight.grad is None else self._projected(weight, weight.grad)
        self.inner.step()
        for group, inner_group in groups:
            if group["projected"]:
                for weight, stand_in in zip(group["params"], inner_group["params"], strict=True):
                    if weight.grad is not None:
                        state = self.state[weight]
                        weight.mul_(1 - group["lr"] * group["weight_decay"])
                        weight.add_(project_back(stand_in, state["left"], state["right"]), alpha=self.scale)
                        stand_in.zero_()
                        stand_in.grad = None

    def _projected(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        num_steps = state.get("num_steps", 0)
        if num_steps % self.update_interval == 0:
            sides = sides_of(weight.shape, self.proj_type)
            state["left"], state["right"] = singular_vectors(gradient, self.rank, sides)
        state["num_steps"] = num_steps + 1
        return project(gradient, state["left"], state["right"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        restore(self.inner, state_dict["inner"])


def restore(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the state in the dtype that it was saved in: torch casts it to the dtype of the weights.

    Adafactor, for example, keeps float32 state for 16-bit weights.
    """
    optimizer.load_state_dict(state_dict)
    for saved_group, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, weight in zip(saved_group["params"], group["params"], strict=True):
            state = optimizer.state[weight]
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor) and name in state and state[name].dtype != value.dtype:
                    state[name] = value.to(weight.device, copy=True)
