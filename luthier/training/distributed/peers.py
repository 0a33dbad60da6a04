"""What the processes of a distributed run know of each other: where each of them is, and whether it still runs.

A process that waits for a dead one in a collective operation may wait for as long as `ddp_timeout` allows, which is
years in many run files. So a thread in each process says every ten seconds, in the store that all of them share, that
it is alive, and listens to the process of the next rank. If that one is silent for five minutes, all processes end,
each with the place where it was.

Where the main thread is at the moment stands in `PLACE_FILE` in the log folder of the process, which torchrun makes.
The launcher names it if the run fails (`luthier.workflow.launch.torchrun`).
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, main_thread
from types import FrameType
from typing import Any

from luthier.core.errors import RunFailed

PLACE_FILE = "place.json"
"""Where a process is: {"place", "lost_peer", "time"}."""
STEP_SECONDS, BEAT_SECONDS, SILENCE_SECONDS = 1.0, 10.0, 300.0
"""How often the place is written, how often a process says that it is alive, and how long it may be silent."""
_PACKAGE = Path(__file__).parents[2]
_LOST, _DONE = "luthier/lost", "done"
_OF_NETWORK = ("gloo/transport", "Gloo", "NCCL", "Socket", "TCPStore", "Connection reset", "Connection closed")
"""Words in the `RuntimeError` of a collective operation whose other side has gone."""


@contextmanager
def watched() -> Iterator[None]:
    """Wraps the work of one process of several. Raises `RunFailed` if another one is lost while this one waits for it.

    Does nothing in a run of one process.
    """
    rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1:
        yield
        return
    watch = Watch(rank, num_processes, _log_folder())
    watch.start()
    place = None
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        place = place_of(_innermost(error))
        raise RunFailed(
            f"rank {rank} lost another process of this run, or timed out waiting for it, in {place}"
            f" ({_reason(error)}) -> see the messages of the other processes"
        ) from error
    finally:
        watch.end(place, lost_peer=place is not None)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective operation failed since another process has ended, is stuck or cannot be reached."""
    distributed = sys.modules.get("torch.distributed")
    kinds = (distributed.DistError,) if distributed is not None else ()
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_NETWORK)
    )


def place_of(frame: FrameType | None) -> str:
    """`all_reduce, called at luthier/training/trainer.py:154 (log)`: the collective operation or the function that the
    stack of `frame` is in, and the line of ours that it was called from."""
    operation, site = "", ""
    while frame is not None:
        code = frame.f_code
        path = Path(code.co_filename)
        if path.name == "distributed_c10d.py" and code.co_name != "wrapper":
            operation = code.co_name  # the outermost one, which is what was called
        elif not operation:
            operation = code.co_name
        if _PACKAGE in path.parents and path != Path(__file__):
            site = f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno} ({code.co_name})"
            break
        frame = frame.f_back
    return f"{operation}, called at {site}" if site else operation


def read_place(folder: Path) -> dict[str, Any] | None:
    """What a process has written into its log folder; None if it has not come that far."""
    try:
        return dict(json.loads((folder / PLACE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


class Watch:
    """The thread of one process."""

    def __init__(self, rank: int, num_processes: int, folder: Path | None) -> None:
        """`folder`: for `PLACE_FILE`; None to write none."""
        self.folder, self.place = folder, ""
        self.pulse: Pulse | None = None
        self.rank, self.num_processes = rank, num_processes
        self.is_over = Event()
        self.thread = Thread(target=self._run, name="luthier-peers", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def end(self, place: str | None = None, *, lost_peer: bool = False) -> None:
        """`place`: the last one, if it is known; else the file says where the process was a moment ago."""
        self.is_over.set()
        self.thread.join(BEAT_SECONDS)
        if place is not None:
            self._write(place, lost_peer=lost_peer)
        if self.pulse is not None:
            self.pulse.leave()

    def _run(self) -> None:
        since = time.monotonic()
        while not self.is_over.wait(STEP_SECONDS):
            self._write(place_of(sys._current_frames().get(main_thread().ident or 0)))
            if time.monotonic() - since >= BEAT_SECONDS:
                since = time.monotonic()
                self._beat(since)

    def _beat(self, now: float) -> None:
        if self.pulse is None:
            store = _shared_store()
            self.pulse = None if store is None else Pulse(store, self.rank, self.num_processes)
        lost = None if self.pulse is None else self.pulse.beat(now)
        if lost is not None and not self.is_over.is_set():
            sys.stderr.write(f"luthier: {lost}; rank {self.rank} was in {self.place} and ends\n")
            sys.stderr.flush()
            self._write(self.place, lost_peer=True)
            # The main thread waits inside the network library, which no exception reaches.
            os._exit(1)

    def _write(self, place: str, *, lost_peer: bool = False) -> None:
        if self.folder is None or (place == self.place and not lost_peer):
            return
        self.place = place
        content = json.dumps({"place": place, "lost_peer": lost_peer, "time": time.time()})
        draft = self.folder / f"{PLACE_FILE}.tmp"
        try:
            draft.write_text(content, encoding="utf-8")
            draft.replace(self.folder / PLACE_FILE)
        except OSError:  # the launcher has removed the folder, or the disk is full: there is nothing to tell then
            self.folder = None


class Pulse:
    """Says in the shared store that this process is alive, and listens to the process of the next rank."""

    def __init__(self, store: Any, rank: int, num_processes: int, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.store, self.rank, self.next = store, rank, (rank + 1) % num_processes
        self.silence_seconds = silence_seconds
        self.count = 0
        self.heard: bytes | None = None
        self.heard_at: float | None = None

    def beat(self, now: float) -> str | None:
        """Why the run must end; None if all is well. `now` in seconds of any clock."""
        self.heard_at = now if self.heard_at is None else self.heard_at
        try:
            self.count += 1
            self.store.set(_name(self.rank), str(self.count))
            if self.store.check([_LOST]):
                return str(self.store.get(_LOST).decode())
            found = self.store.get(_name(self.next)) if self.store.check([_name(self.next)]) else None
        except RuntimeError:  # the process that holds the store may have gone
            found = self.heard
        if found == _DONE.encode() or found != self.heard:
            self.heard, self.heard_at = found, now
        if now - self.heard_at < self.silence_seconds:
            return None
        lost = f"nothing was heard of rank {self.next} for {now - self.heard_at:.0f} s"
        self._tell(_LOST, lost)
        return lost

    def leave(self) -> None:
        """This process ends, and its silence means nothing."""
        self._tell(_name(self.rank), _DONE)

    def _tell(self, name: str, value: str) -> None:
        try:
            self.store.set(name, value)
        except RuntimeError:  # the process that held the store has ended before
            return


def _name(rank: int) -> str:
    return f"luthier/alive/{rank}"


def _shared_store() -> Any:
    """A connection of its own to the store of all processes, which the main thread may block; None if there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store().clone()


def _log_folder() -> Path | None:
    """The folder that torchrun has made for the logs of this process."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent if error_file else None


def _reason(error: BaseException) -> str:
    """The first sentence of what the network library says, without the file of its own that says it."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[[^\]]*\] *", "", line).split(". ")[0]


def _innermost(error: BaseException) -> FrameType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame
