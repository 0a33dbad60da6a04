"""The model and the rows of the checks, and one training run of them."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.bench_startup import make_model
from benchmarks.goals import inputs

LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
"""The shape of Llama 3.2 1B; with a head of its own 1.5 billion weights."""
TINY = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PACK_TOKENS, TINY_PACK_TOKENS = 4096, 512
REWARDS = '''\
"""The share of small letters in an answer."""


def small_letters(completions: list[str]) -> list[float]:
    return [sum(letter.islower() for letter in text) / max(len(text), 1) for text in completions]
'''


@dataclass(frozen=True)
class World:
    folder: Path
    device: str
    is_tiny: bool

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def pack_tokens(self) -> int:
        return TINY_PACK_TOKENS if self.is_tiny else PACK_TOKENS

    @property
    def marker(self) -> Path:
        return self.folder / "made"

    @cached_property
    def bf16(self) -> bool:
        """Whether runs are in bfloat16; a CPU may be unable to."""
        from luthier.core.machine import detect

        return detect().bf16

    def make(self) -> None:
        """Write model and rows, once."""
        if self.marker.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        make_model(self.model, **(TINY if self.is_tiny else LARGE), dtype="float32" if self.is_tiny else "bfloat16")
        inputs.write_data(self.folder)
        (self.folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
        self.marker.touch()

    def keys(self, **changes: Any) -> dict[str, Any]:
        """Of a run of one step of two rows."""
        shared = inputs.run_keys(self.model, self.folder, num_steps=1, batch_size=2)
        shared |= {"template": "auto", "cutoff_len": 512 if self.is_tiny else 2048, "max_samples": 16}
        shared |= {"bf16": self.bf16, "skip_memory_check": True}
        return {**shared, **changes}


@dataclass(frozen=True, slots=True)
class Done:
    """A run of luthier."""

    losses: list[float]
    seconds: float
    """Of training alone."""
    tokens_per_second: float
    compared: Mapping[str, Any]
    """Planned and actual (`luthier.workflow.plan.foresight`)."""
    unavailable: Mapping[str, str]
    """Key -> why it was not done as asked."""


def train(world: World, keys: Mapping[str, Any]) -> Done:
    import luthier

    fresh_memory()
    result = luthier.train(keys)
    manifest = json.loads((Path(keys["output_dir"]) / "manifest.json").read_text(encoding="utf-8"))
    metrics = result.metrics["train"]
    return Done(
        losses=[logs["loss"] for logs in result.log_history if "loss" in logs],
        seconds=metrics["train_runtime"],
        tokens_per_second=float(next(logs["throughput"] for logs in reversed(result.log_history) if "loss" in logs)),
        compared=dict(result.compared),
        unavailable=manifest.get("not_as_asked", {}),
    )


def fresh_memory() -> None:
    """Give back what earlier runs held, so that the peak is that of the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gigabytes() -> float | None:
    """What PyTorch has reserved on the device at most; None without one."""
    import torch

    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None


def step_seconds(steps: list[float]) -> float:
    """The median of all but the first two, in which kernels are chosen and compiled."""
    import statistics

    return statistics.median(steps[2:] or steps)


class StepClock:
    """Seconds of each step of every transformers.Trainer while it is entered; waits for the device.

    The last step is profiled instead, where there is a GPU: a GPU that is idle waits for the CPU to start its kernels.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.profiled: dict[str, float] = {}
        """Of the last step: how many kernels it started, and the milliseconds that they took."""

    def __enter__(self) -> "StepClock":
        from transformers import TrainerCallback, trainer

        clock = self

        class Steps(TrainerCallback):
            start, profile = 0.0, None

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.start = now()

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == state.max_steps - 1:
                    self.profile = started_profile()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                end = now()
                if self.profile is None:
                    clock.seconds.append(end - self.start)
                else:
                    clock.profiled = kernel_figures(self.profile)
                self.start = end

        self._callback = Steps
        callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
        callbacks.append(Steps)
        return self

    def __exit__(self, *exc: object) -> None:
        from transformers import trainer

        callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
        callbacks.remove(self._callback)


def started_profile() -> Any:
    """None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profile.start()
    return profile


def kernel_figures(profile: Any) -> dict[str, float]:
    from torch.autograd import DeviceType

    profile.stop()
    on_device = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    milliseconds = sum(event.self_device_time_total for event in on_device) / 1e3
    return {"kernels": float(len(on_device)), "kernels ms": milliseconds}


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
