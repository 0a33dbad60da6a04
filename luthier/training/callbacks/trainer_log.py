"""trainer_log.jsonl: one JSON object per logged step, with the names that users' scripts and the web page read."""

import errno
import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from luthier.core.files import write_atomically
from luthier.core.log import warn

RENAMED = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "lr",
    "epoch": "epoch",
    "rewards/accuracies": "accuracy",
    "throughput": "throughput",
    "num_input_tokens_seen": "total_tokens",
}
LEFT_OUT = {"step", "total_flos"}
LONGEST_LINE_BYTES = 1 << 16
EVALUATED_BATCHES = 5
"""A run that only evaluates says how far it is after every so many batches; answers count like batches."""
TIMING = ("_runtime", "_samples_per_second", "_steps_per_second", "_tokens_per_second")


class TrainerLog(TrainerCallback):
    """Appends to the log on the main process."""

    def __init__(self, path: Path, *, overwrites: bool, trains: bool = True) -> None:
        """A resumed run keeps the lines up to its checkpoint; with `overwrites` the log starts empty. A run that does
        not train appends how far its evaluation is."""
        self.path, self.overwrites, self.trains = path, overwrites, trains
        self.start_seconds = 0.0
        self.loader: Any = None
        """What a run that does not train evaluates at the moment, a loader or rows to answer. `num_evaluated` batches
        or answers of it are done."""
        self.num_evaluated = 0
        self.start_step = 0
        self.first_step_seconds: float | None = None
        self.has_failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_seconds = time.monotonic()
        self.start_step = state.global_step
        if not state.is_world_process_zero or not self.path.exists():
            return
        if self.overwrites or state.global_step == 0:
            self.path.unlink()
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_atomically(self.path, "".join(line for line in lines if _is_until(line, state.global_step)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What comes before, such as reading again up to the checkpoint, is not repeated, so it says nothing of what
        is left."""
        if self.first_step_seconds is None:
            self.first_step_seconds = time.monotonic()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trains or not state.is_world_process_zero:
            return
        if self.loader is not kwargs["eval_dataloader"]:
            self.loader, self.num_evaluated, self.start_seconds = kwargs["eval_dataloader"], 0, time.monotonic()
        self.num_evaluated += 1
        if self.num_evaluated % EVALUATED_BATCHES == 0:
            self._write(self.num_evaluated, len(self.loader), {})

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.loader is not None:
            self._write(self.num_evaluated, len(self.loader), metrics)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.start_seconds:
            return
        if self.trains:
            self._write(state.global_step, state.max_steps, kwargs["logs"])
        else:
            self._write(self.num_evaluated, len(self.loader), kwargs["logs"])

    def _write(self, step: int, num_steps: int, logs: Mapping[str, Any]) -> None:
        line: dict[str, Any] = {"current_steps": step, "total_steps": num_steps}
        for name, value in logs.items():
            if name in LEFT_OUT or name.endswith(TIMING) or not isinstance(value, int | float):
                continue
            line[RENAMED.get(name, name)] = value
        now, done = time.monotonic(), step - self.start_step
        elapsed = now - self.start_seconds
        working = now - (self.first_step_seconds or now) if self.trains else elapsed
        left = working / done * (num_steps - step) if done else 0.0
        line["percentage"] = round(100 * step / num_steps, 2) if num_steps else 100.0
        line["elapsed_time"] = str(timedelta(seconds=int(elapsed)))
        line["remaining_time"] = str(timedelta(seconds=int(left)))
        self._append(json.dumps(line) + "\n")

    def _append(self, line: str) -> None:
        """Only warns if the log cannot be written: the run should not be lost for that."""
        try:
            append_whole(self.path, line.encode())
        except OSError as fault:
            if not self.has_failed:
                warn(f"{self.path}: cannot be written ({fault.strerror}); training continues without it")
            self.has_failed = True


def append_whole(path: Path, line: bytes) -> None:
    """Append all of `line` in one system call, or nothing. Raises `OSError`.

    A full disk may take a part of it, which is taken back. So is a line that a killed process has left without an end.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.lseek(number, 0, os.SEEK_END)
        tail = os.pread(number, LONGEST_LINE_BYTES, max(size - LONGEST_LINE_BYTES, 0))
        if not tail.endswith(b"\n"):
            size -= len(tail) - (tail.rfind(b"\n") + 1)
            os.ftruncate(number, size)
        written = os.write(number, line)
        if written < len(line):
            os.ftruncate(number, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(number)


def _is_until(line: str, step: int) -> bool:
    """Whether this is a complete line of a step up to `step`; a killed process may leave a partial line."""
    try:
        written = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return False
    match written:
        case {"current_steps": int(current)}:
            return current <= step
    return False
