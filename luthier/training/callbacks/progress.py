"""The progress bar on stderr: steps, loss, tokens per second and time left. Without a terminal, one line per log."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Shown by the main process only."""

    def __init__(self, headline: Sequence[str] = ()) -> None:
        """`headline`: metrics of the stage that are shown next to the loss."""
        self.headline = headline
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
        self.bar = Progress("train", *columns, TimeElapsedColumn(), "left", TimeRemainingColumn(), console=self.console)
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numbers = numbers_of(kwargs["logs"], self.headline)
        if not state.is_world_process_zero or not numbers:
            return
        if self.bar is not None:
            self.bar.update(self.task, numbers=numbers)
        elif not self.console.is_terminal:
            print(f"step {state.global_step}/{state.max_steps}  {numbers}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def numbers_of(logs: Mapping[str, Any], headline: Sequence[str] = ()) -> str:
    """loss 1.2340  reward 0.8125  lr 1.00e-04  512 tokens/s"""
    # Where each dataset is evaluated by itself, its name is part of the names of its metrics.
    sets = [name.removesuffix("runtime") for name in logs if name.startswith("eval_") and name.endswith("_runtime")]
    prefixes = dict.fromkeys(("", "eval_", *sets))
    names = [f"{prefix}loss" for prefix in prefixes] + [f"{prefix}{name}" for prefix in prefixes for name in headline]
    parts = [f"{name} {round(logs[name], 4) + 0.0:.4f}" for name in names if name in logs]  # -0.0 + 0.0 is 0.0
    if parts and "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2e}")
    if "throughput" in logs:
        parts.append(f"{logs['throughput']:.0f} tokens/s")
    return "  ".join(parts)
