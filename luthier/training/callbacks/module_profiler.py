"""Profiler of the forward and backward times of modules, logged at each logging step."""

import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from luthier.core.errors import InvalidInput
from luthier.core.log import info
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

MAX_LINES = 30
"""The slowest modules that a log lists."""


class ModuleProfiler(TrainerCallback):
    """Times the modules whose full names match one of `patterns`, e.g. `*.mlp`, `model.layers.0.*`.

    On an accelerator these are device times. With gradient checkpointing every forward pass is counted. A module whose
    inputs need no gradient has no backward time.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self.spans: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
        self.open: dict[tuple[str, str], list[Any]] = {}
        self.handles: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attach(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.spans:
            info("\n".join([f"module times up to step {state.global_step}", *self.lines()]))
            self.spans = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def attach(self, model: "nn.Module") -> None:
        """Raises `InvalidInput` if no module matches."""
        for name, module in unwrap(model).named_modules():
            if any(fnmatchcase(name, pattern) for pattern in self.patterns):
                self.handles += [
                    module.register_forward_pre_hook(partial(self._begin, (name, "forward"))),
                    module.register_forward_hook(partial(self._end, (name, "forward"))),
                    module.register_full_backward_pre_hook(partial(self._begin, (name, "backward"))),
                    module.register_full_backward_hook(partial(self._end, (name, "backward"))),
                ]
        if not self.handles:
            raise InvalidInput(
                f"profile_modules: {', '.join(self.patterns)}: matches no module of {type(unwrap(model)).__name__}"
                " -> use patterns of full names, e.g. '*.mlp'"
            )

    def _begin(self, key: tuple[str, str], *hook_arguments: Any) -> None:
        self.open.setdefault(key, []).append(_now())

    def _end(self, key: tuple[str, str], *hook_arguments: Any) -> None:
        if self.open.get(key):
            self.spans.setdefault(key, []).append((self.open[key].pop(), _now()))

    def lines(self) -> Iterator[str]:
        """One per module: total milliseconds and number of its passes since the last log."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times: dict[str, dict[str, tuple[float, int]]] = {}
        for (name, direction), spans in self.spans.items():
            total = sum(_milliseconds(start, end) for start, end in spans)
            times.setdefault(name, {})[direction] = (total, len(spans))
        slowest = sorted(times.items(), key=lambda item: -sum(total for total, _ in item[1].values()))
        for name, passes in slowest[:MAX_LINES]:
            parts = [f"{direction} {total:.1f} ms in {count}" for direction, (total, count) in sorted(passes.items())]
            yield f"  {name}: {', '.join(reversed(parts))}"
        if len(slowest) > MAX_LINES:
            yield f"  and {len(slowest) - MAX_LINES} more"


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
