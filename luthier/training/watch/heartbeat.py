"""`heartbeat.json` in the output folder, written every 30 seconds for as long as the process of a run lives.

    {"time": "2026-01-31T12:00:30Z", "phase": "training", "step": 120, "total_steps": 3000, "step_seconds": 4.1,
     "memory_bytes": 21474836480, "peak_memory_bytes": 24696061952, "process": 4711, "host": "gpu-07"}

A thread writes it, also while a step is slow or data are prepared. So a file that is older says that the process was
killed or hangs as a whole, and `step_seconds` of a young one how long the present step has been running. Other
processes of a run than the first one write `heartbeat_RANK.json`. The file goes when the run has ended.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from transformers import TrainerCallback

from luthier.core.allocator import peak_resident_bytes
from luthier.core.drafts import draft_name

BEAT_SECONDS = 30.0


class Heartbeat(TrainerCallback):
    """The file, and what it says about the run; as a callback it follows the steps."""

    def __init__(self, output_dir: Path, device: str) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self.path = output_dir / (f"heartbeat_{rank}.json" if rank else "heartbeat.json")
        self.device = device
        self.phase = "preparing"
        self.step: int | None = None
        self.total_steps: int | None = None
        self._step_began: float | None = None
        self._ends = Event()

    @contextmanager
    def beating(self) -> Iterator[None]:
        thread = Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        """A disk that fails costs the heartbeat and nothing else."""
        while True:
            with suppress(OSError):
                self.write()
            if self._ends.wait(BEAT_SECONDS):
                return

    def write(self) -> None:
        """Replaces the file as a whole. It is not flushed, so a slow disk does not hold it up."""
        draft = self.path.with_name(draft_name(self.path.name))
        draft.write_text(json.dumps(self.facts()) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def facts(self) -> dict[str, Any]:
        began = self._step_began
        memory, peak = memory_bytes(self.device)
        return {
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "phase": self.phase,
            "step": self.step,
            "total_steps": self.total_steps,
            "step_seconds": None if began is None else round(time.monotonic() - began, 1),
            "memory_bytes": memory,
            "peak_memory_bytes": peak,
            "process": os.getpid(),
            "host": platform.node(),
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase, self.step, self.total_steps = "training", state.global_step + 1, state.max_steps
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase = "evaluating" if control.should_evaluate else "saving" if control.should_save else "training"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase = "evaluating"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trains = self._step_began is not None
        self.phase = "ending" if not trains else "saving" if control.should_save else "training"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase, self._step_began = "ending", None


def memory_bytes(device: str) -> tuple[int, int | None]:
    """What this process holds now, and the most so far: of the host on a CPU, else of the accelerator."""
    if device == "cuda":
        import torch

        # Of all devices: a thread has the first one as its own, whatever that of the process is.
        devices = range(torch.cuda.device_count())
        return sum(map(torch.cuda.memory_reserved, devices)), sum(map(torch.cuda.max_memory_reserved, devices))
    return psutil.Process().memory_info().rss, peak_resident_bytes()
