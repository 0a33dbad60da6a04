"""The end of a measured program: it waits for its turn before each step and says how long the step took.

Only the standard library and, for `watch_trainer`, transformers are imported, so that every program can use this.
A turn begins when the parent allows it and ends after the optimizer's step. It holds the fetching of the batch, what
is computed before the step, forward, backward and the optimizer. CPU seconds are those of all threads.
"""

import json
import os
import resource
import socket
import sys
import time
from typing import Any

SOCKET = "LUTHIER_BENCH_SOCKET"
"""Environment variable: the number of the file descriptor of the socket to the parent."""


class Clock:
    """Without a parent, turns are granted at once and nothing is reported."""

    def __init__(self) -> None:
        number = os.environ.get(SOCKET)
        self._stream = None if number is None else socket.socket(fileno=int(number)).makefile("rw")
        self._start_seconds = self._start_cpu_seconds = 0.0
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        """What else the program has to say at its end."""

    def begin(self) -> None:
        """Wait for the turn."""
        if self._stream is not None:
            self._say({"ready": True})
            if not self._stream.readline():
                sys.exit("the parent is gone")
        self._start_seconds, self._start_cpu_seconds = time.perf_counter(), time.process_time()

    def end(self) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._start_seconds, time.process_time() - self._start_cpu_seconds
        self._say({"seconds": seconds, "cpu_seconds": cpu_seconds})

    def finish(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        self._say({"finished": {"losses": self.losses, "peak_bytes": peak_bytes, **self.facts}})

    def _say(self, message: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()


def watch_trainer(clock: Clock) -> None:
    """Every transformers.Trainer of this process, whoever subclassed it, takes its steps in turns from now on."""
    from transformers import TrainerCallback, trainer

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end()
            if state.global_step < state.max_steps:
                clock.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(Turns)
