"""The steps of BAdam; the method is described in `luthier.training.optimizers.badam`."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from luthier.training.optimizers._seeds import seed_from

Picks = Mapping[torch.nn.Parameter, torch.Tensor | slice | None]
"""Weight -> its trained flat indices, or None for the whole weight. Weights that are not listed are frozen."""

MIN_SHARED_SIZE = 100
"""In ratio mode, weights of up to this many elements are trained as a whole."""


class BlockCoordinateDescent(Optimizer):
    """An inner optimizer trains one part of the weights for a while; then a new one trains the next part.

    A weight that is not float32, or is trained only in part, has a float32 proxy while it is trained.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        build_inner: Callable[[list[dict[str, Any]]], Optimizer],
        part_of: Callable[[int], int],
        picks: Callable[[int], Picks],
        *,
        lr: float,
        switch_interval: int,
        report: Callable[[int], None],
    ) -> None:
        """`part_of`: turn -> index of the part; `picks`: index -> the part; `switch_interval`: in steps, -1 for never.

        `report` is called with the index of each new part.
        """
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0})
        self.build_inner, self.part_of, self.picks, self.report = build_inner, part_of, picks, report
        self.switch_interval = switch_interval
        self.num_steps = 0
        self._begin(part_of(0))

    def _turn(self) -> int:
        return 0 if self.switch_interval < 0 else self.num_steps // self.switch_interval

    def _begin(self, part: int) -> None:
        """Switch to training `part`: only its gradients are computed."""
        self.part, picks = part, self.picks(part)
        self.indices = picks
        self.stand_ins: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        groups = []
        for group in self.param_groups:
            for weight in group["params"]:
                weight.requires_grad_(weight in picks)
                if weight in picks:
                    self.stand_ins[weight] = _stand_in(weight, picks[weight])
                else:
                    weight.grad = None
            members = [self.stand_ins[weight] for weight in group["params"] if weight in picks]
            groups.append({"params": members, "weight_decay": group["weight_decay"]})
        self.inner = self.build_inner(groups)
        self.report(part)

    def _end(self) -> None:
        """Free what the part held before the next one gets its own."""
        self.stand_ins.clear()
        self.inner.state.clear()
        self.inner.param_groups.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner_group["lr"] = group["lr"]
        for weight, stand_in in self.stand_ins.items():
            if stand_in is not weight and weight.grad is not None:
                index = self.indices[weight]
                gradient = weight.grad if index is None else weight.grad.flatten()[index]
                stand_in.grad = gradient.to(stand_in.dtype)
        self.inner.step()
        for weight, stand_in in self.stand_ins.items():
            if stand_in is not weight:
                stand_in.grad = None
                index = self.indices[weight]
                if index is None:
                    weight.copy_(stand_in)
                else:
                    weight.view(-1)[index] = stand_in.to(weight.dtype)
        self.num_steps += 1
        part = self.part_of(self._turn())
        if part != self.part:
            self._end()
            self._begin(part)

    def state_dict(self) -> dict[str, Any]:
        copies = [s.detach() for weight, s in self.stand_ins.items() if s is not weight]
        state = {"num_steps": self.num_steps, "inner": self.inner.state_dict(), "stand_ins": copies}
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.num_steps = state_dict["num_steps"]
        part = self.part_of(self._turn())
        if part != self.part:
            self._end()
            self._begin(part)
        self.inner.load_state_dict(state_dict["inner"])
        copies = [stand_in for weight, stand_in in self.stand_ins.items() if stand_in is not weight]
        with torch.no_grad():
            for stand_in, copy in zip(copies, state_dict["stand_ins"], strict=True):
                stand_in.copy_(copy)


def _stand_in(weight: torch.nn.Parameter, index: torch.Tensor | slice | None) -> torch.nn.Parameter:
    if index is None and weight.element_size() >= 4:
        return weight
    values = weight.detach() if index is None else weight.detach().flatten()[index]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.nn.Parameter(values.to(dtype, copy=True))


def block_order(num_blocks: int, mode: str, start: int | None, seed: int) -> Callable[[int], int]:
    """Turn -> block. A random order visits every block once per round; `start` comes first."""
    if mode == "fixed":
        return lambda turn: start or 0
    if mode == "ascending":
        return lambda turn: ((start or 0) + turn) % num_blocks
    if mode == "descending":
        first = num_blocks - 1 if start is None else start
        return lambda turn: (first - turn) % num_blocks

    def shuffled(turn: int) -> int:
        if start is not None and turn == 0:
            return start
        round_number, index = divmod(turn if start is None else turn - 1, num_blocks)
        return random.Random(seed_from(seed, round_number)).sample(range(num_blocks), num_blocks)[index]

    return shuffled


def share_of(
    weights: Sequence[torch.nn.Parameter], ratio: float, *, adjacent: bool, seed: int
) -> Callable[[int], Picks]:
    """Turn -> a random share `ratio` of each weight: adjacent entries, or entries anywhere."""

    def picks(turn: int) -> Picks:
        found: dict[torch.nn.Parameter, torch.Tensor | slice | None] = {}
        for number, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(seed_from(seed, number, turn))
            size = weight.numel()
            num_picked = max(1, round(ratio * size))
            if size <= MIN_SHARED_SIZE or num_picked >= size:
                found[weight] = None
            elif adjacent:
                first = int(torch.randint(size - num_picked + 1, (), generator=generator))
                found[weight] = slice(first, first + num_picked)
            else:
                # The numbers are drawn on the CPU, so they are the same on every device.
                place = "meta" if weight.is_meta else "cpu"
                drawn = torch.randperm(size, generator=generator, device=place)[:num_picked]
                found[weight] = drawn.sort().values.to(weight.device)
        return found

    return picks
