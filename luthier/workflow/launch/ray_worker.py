"""What each worker of Ray does: it starts a process that trains, passes on what that prints, and tells its end."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from luthier.core.machine import num_cpus
from luthier.core.manifest import MANIFEST_NAME
from luthier.workflow.launch.child import command_of
from luthier.workflow.launch.run_files import run_file

INTERRUPTED, WRONG_INPUT = 130, 2
POLL_SECONDS = 1.0
SETTLE_SECONDS = 10.0
"""How long the other processes may take to end with the same error."""
DRAIN_SECONDS = 10.0
"""How long what a process has printed may take to be read after its end. Another process may hold the pipes open."""
TAIL_LINES = 40
_LAST_WORDS = re.compile(r"^(?:luthier: (.*(?:\n  .*)*)|(stopped: .*))", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the process of one worker ended."""

    status: int
    error: str
    """What luthier printed about it; empty if nothing, e.g. because it was killed."""


class Endings:
    """An actor: how the processes ended, whether another start can help, and whether the user asked them to stop."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.num_starts: dict[int, int] = {}
        """Rank -> how often it has started."""
        self.ended: dict[int, Ending] = {}
        """Rank -> how it ended, of the current start."""
        self.final: Ending | None = None
        """Of all processes, if another start cannot help."""
        self.num_asked = 0
        self.printed = ""

    def begin(self, rank: int) -> tuple[int, bool]:
        """(how often this rank has started before, whether there is something to do)."""
        before = self.num_starts.get(rank, 0)
        self.num_starts[rank] = before + 1
        self.ended.pop(rank, None)
        return before, self.final is None

    def end(self, rank: int, status: int, error: str, printed: str) -> None:
        self.ended[rank] = Ending(status, error)
        self.printed = printed if rank == 0 else self.printed
        found = list(self.ended.values())
        if status in (WRONG_INPUT, INTERRUPTED):
            if self.final is None or not self.final.error:
                self.final = self.ended[rank]
        elif len(found) == self.num_workers and all(ending.error for ending in found):
            self.final = self.final or found[0]

    def verdict(self) -> str:
        """`over`: all have ended with an error that would come again; `again`: one has crashed; `open`: not known."""
        if any(ending.status != 0 and not ending.error for ending in self.ended.values()):
            return "again"
        return "over" if self.final is not None and len(self.ended) == self.num_workers else "open"

    def ask_to_stop(self) -> None:
        self.num_asked += 1

    def asked(self) -> int:
        return self.num_asked

    def result(self) -> tuple[int, str, str]:
        """(exit status, error, what the first process printed)."""
        return (0, "", self.printed) if self.final is None else (self.final.status, self.final.error, self.printed)


def work(config: Mapping[str, Any]) -> None:
    """The function of each worker. Raises `RuntimeError` if its process crashed: Ray starts all of them again."""
    import ray
    from ray import train

    context, endings = train.get_context(), config["endings"]
    rank = context.get_world_rank()
    num_before, goes_on = ray.get(endings.begin.remote(rank))
    if not goes_on:
        return
    keys = dict(config["keys"])
    if num_before:
        keys |= where_to_go_on(keys, config["earlier"])
    environment = environment_of(config["environment"], context)
    with tempfile.TemporaryDirectory(prefix="luthier-ray-") as folder:
        path = Path(folder, "run.yaml")
        path.write_text(run_file(keys).text, encoding="utf-8")
        child = Child(["train", str(path)], environment, config["folder"])
        status = child.watch(lambda: ray.get(endings.asked.remote()))
    ray.get(endings.end.remote(rank, status, child.error, child.printed))
    if status not in (0, INTERRUPTED):
        if is_over(lambda: ray.get(endings.verdict.remote())):
            return
        raise RuntimeError(f"process {rank} ended with status {status}: {child.error or 'see its log'}")
    train.report(metrics_of(Path(keys["output_dir"])) if rank == 0 else {})


def is_over(verdict: Callable[[], str]) -> bool:
    """Whether all processes end soon with an error that would come again. Otherwise Ray has to end the others."""
    end = time.monotonic() + SETTLE_SECONDS
    while (found := verdict()) == "open" and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return found == "over"


def environment_of(given: Mapping[str, str], context: Any) -> dict[str, str]:
    """Of the process: that of this worker with `given`, and the variables that torchrun would set."""
    num_local = context.get_local_world_size()
    threads = str(max(1, num_cpus() // num_local))  # Ray sets 1, whatever else the node has to do
    own = {name: value for name, value in os.environ.items() if name not in ("USE_RAY", "OMP_NUM_THREADS")}
    return {
        **own,
        "OMP_NUM_THREADS": threads,
        **given,
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(num_local),
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": os.environ["MASTER_PORT"],
    }


def metrics_of(output_dir: Path) -> dict[str, Any]:
    import json

    try:
        return dict(json.loads((output_dir / "all_results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def where_to_go_on(keys: Mapping[str, Any], earlier: Mapping[str, int]) -> dict[str, Any]:
    """The keys that let a restarted run resume from its own newest checkpoint, where the run file says something else.

    `earlier`: checkpoint -> time of its manifest, of those that were there before the run began.
    """
    from luthier.training.checkpoints.store import checkpoints_in, fault_of, step_of

    resumes = str(keys.get("resume_from_checkpoint") or "").lower()
    if not keys.get("overwrite_output_dir") and resumes in ("", "true", "false"):
        return {}
    for folder in sorted(checkpoints_in(Path(keys["output_dir"])), key=step_of, reverse=True):
        manifest = folder / MANIFEST_NAME
        is_own = manifest.is_file() and manifest.stat().st_mtime_ns != earlier.get(folder.name)
        if is_own and fault_of(folder) is None:
            return {"resume_from_checkpoint": str(folder)}
    return {}


class Child:
    """A process of luthier. What it prints to stderr goes on to that of this process, which Ray shows at the driver."""

    def __init__(self, words: list[str], environment: Mapping[str, str], folder: str) -> None:
        self.process = subprocess.Popen(
            command_of(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=folder if os.path.isdir(folder) else None,
            text=True,
            errors="replace",
        )
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.printed = ""

    @property
    def error(self) -> str:
        """What luthier printed about its end: an error, or the checkpoint of a run that was asked to stop."""
        found = _LAST_WORDS.findall("".join(self.lines))
        return "".join(found[-1]) if found else ""

    def watch(self, num_asked: Callable[[], int]) -> int:
        """Waits for the end, and passes on that the user asked to stop. Returns the exit status."""
        assert self.process.stdout is not None and self.process.stderr is not None, "both are pipes"
        pumps = [
            threading.Thread(target=self._pass_on, args=(self.process.stderr,), daemon=True),
            threading.Thread(target=self._keep, args=(self.process.stdout,), daemon=True),
        ]
        for pump in pumps:
            pump.start()
        num_sent = 0
        while True:
            try:
                status = self.process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                asked = num_asked()
                if asked > num_sent:
                    self.process.send_signal(signal.SIGINT)
                    num_sent = asked
        for pump in pumps:
            pump.join(DRAIN_SECONDS)
        return status

    def _pass_on(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.lines.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()

    def _keep(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.printed += line
