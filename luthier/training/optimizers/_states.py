"""The optimizers of `optim` on PyTorch's `meta` device, where the plan of a run steps and their kernels do not exist.

AdamW           two moments in the format of the weight, and the number of steps
AdamW, 8 bits   two moments of a byte, and a float32 scale for each 256 numbers of both; float32 moments for weights of
                less than 4,096 numbers (bitsandbytes)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from luthier.training.optimizers import ADAMW, SMALLEST_OF_8_BITS

OF_8_BITS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
HAS_NO_KERNEL = (*ADAMW, *OF_8_BITS)
NUMBERS_PER_SCALE, NUM_CODES = 256, 256


class StatesAlone(Optimizer):
    """Has the states of the optimizer `optim`, and reads and writes what that would."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, optim: str, lr: float) -> None:
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0})
        self.optim = optim
        self.codes: list[torch.Tensor] = []
        """Of the numbers of a byte, signed and unsigned; all weights share them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(self._moments_of_8_bits(weight) if self.optim in OF_8_BITS else _moments(weight))
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    moment.copy_(weight.grad)
                weight.add_(weight.grad)

    def _moments_of_8_bits(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if weight.numel() < SMALLEST_OF_8_BITS:
            first, second = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
            return {"exp_avg": first, "exp_avg_sq": second}
        if not self.codes:
            self.codes = [weight.new_zeros(NUM_CODES, dtype=torch.float32) for _ in range(2)]
        found = {name: torch.zeros_like(weight, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")}
        num_scales = -(-weight.numel() // NUMBERS_PER_SCALE)
        scales = {f"{name}_scales": weight.new_zeros(num_scales, dtype=torch.float32) for name in found}
        return {**found, **scales}


def _moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": weight.new_zeros((), dtype=torch.float32), **moments}
