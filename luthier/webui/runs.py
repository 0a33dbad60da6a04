"""The runs below a folder, each with its state, from files alone.

    board.yaml         the run file, as the user wrote it
    board.json         {"argv", "pid", "mark", "keeper_pid", "keeper_mark", "host", "started", "title"}, by `keeper`
    console.log        what the process printed, of all its starts
    stop.json          {"asked"}: somebody asked it to stop
    exit.json          {"status", "ended"}: how it ended, by `keeper`
    trainer_log.jsonl  the numbers of each logged step, by `luthier train`
    heartbeat.json     where it is, every 30 seconds for as long as its process lives, by `luthier train`

A run that was started in a terminal has trainer_log.jsonl only. Files may be missing, half-written or of another
machine at any time.
"""

import json
import os
import platform
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from luthier.core.log import warn
from luthier.core.manifest import EXIT, RECORD, RUN_FILE, STOP
from luthier.webui.identity import is_same

State = Literal["starting", "running", "stopping", "done", "stopped", "failed", "lost", "unfinished"]
LIVE: tuple[State, ...] = ("starting", "running", "stopping")
LOG, HEARTBEAT = "trainer_log.jsonl", "heartbeat.json"
RESULTS = ("all_results.json", "manifest.json")
"""What `luthier train` writes when it is done."""
FRESH_SECONDS = 120.0
"""A run of a terminal, or of another machine, whose log changed within this time is running."""
STARTING_SECONDS = 15.0
SILENT_SECONDS = 90.0
"""A run whose heartbeat is older hangs as a whole, or its process is stopped or has been killed."""
INTERRUPTED = 130
MAX_DEPTH = 6
_TAIL_BYTES = 4096
_MAX_BYTES = 1 << 20
_YEAR_9999 = 253_370_764_800
"""In seconds since 1970. Python has no later dates."""


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    state: State
    pid: int = 0
    mark: str = ""
    """Of the process; see `identity`. Empty if the board did not start it, or if it runs on another machine."""
    host: str = ""
    """The machine, if it is not this one."""
    started: float = 0.0
    """Seconds since 1970; 0 if unknown."""
    ended: float = 0.0
    status: int | None = None
    """The exit status; negative for a signal."""
    silent_since: float = 0.0
    """The last heartbeat of a live run that has been silent for too long, in seconds since 1970; else 0."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last whole line of trainer_log.jsonl; its `loss` is that of the last line that has one."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def is_ours(self) -> bool:
        """Whether its process can be reached from here."""
        return bool(self.mark)

    @property
    def run_file(self) -> Path | None:
        """The file that it was started with, or the one that `luthier train` left at its end."""
        return next((path for name in (RUN_FILE, "run.yaml") if os.path.isfile(path := self.folder / name)), None)

    @property
    def text(self) -> str:
        """The text of its run file; empty if there is none that can be read."""
        try:
            return self.run_file.read_text(encoding="utf-8", errors="replace") if self.run_file else ""
        except OSError:
            return ""


def is_run(names: set[str]) -> bool:
    """Whether a folder with these files is that of a run."""
    return RECORD in names or RUN_FILE in names or LOG in names


def find_runs(root: Path) -> list[Run]:
    """Every run below `root`, the latest first. Passed over are folders that cannot be read, and those whose names are
    not UTF-8, of which the log speaks: a page has no address for them."""
    runs = [read_run(folder) for folder in _folders(root, MAX_DEPTH)]
    return sorted(runs, key=lambda run: (not run.is_live, -run.started, str(run.folder)))


def _folders(folder: Path | str, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if is_run(names):
        yield Path(folder)
    if depth == 0 or "pyvenv.cfg" in names:
        return
    for entry in entries:
        is_inner = entry.name.startswith((".", "checkpoint-", "__")) or entry.name == "node_modules"
        if not is_inner and _is_folder(entry) and is_shown(entry.path):
            yield from _folders(entry.path, depth - 1)


@cache
def is_shown(path: str) -> bool:
    """Whether a name is UTF-8. The log names one that is not, once."""
    try:
        path.encode()
    except UnicodeEncodeError:
        warn(f"webui: {os.fsencode(path)!r}: is not shown, since its name is not UTF-8 -> rename it")
        return False
    return True


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def read_run(folder: Path, now: float | None = None) -> Run:
    """The run of a folder, whatever its files hold."""
    now = time.time() if now is None else now
    record, ending = read_object(folder / RECORD), read_object(folder / EXIT)
    status = ending.get("status")
    host = record.get("host")
    pid, mark = _process_in(record) if host == platform.node() else (0, "")
    is_alive = _is_alive(record) if mark else None
    if status is None and is_alive is False:  # it may have ended since its end was looked for
        ending = read_object(folder / EXIT)
    status = ending.get("status")
    status = status if isinstance(status, int) else None
    changed = _modified(folder / LOG)
    run_file_changed = _modified(folder / RUN_FILE)
    state, beat = _state(folder, status, is_alive, now), _modified(folder / HEARTBEAT)
    started = _time(record.get("started")) or run_file_changed or changed
    is_silent = state in LIVE and started <= beat < now - SILENT_SECONDS
    return Run(
        folder=folder,
        state=state,
        pid=pid,
        mark=mark,
        host=host if isinstance(host, str) and host != platform.node() else "",
        started=started,
        ended=_time(ending.get("ended")),
        status=status,
        silent_since=beat if is_silent else 0.0,
        last=last_line(folder / LOG),
    )


def _process_in(record: Mapping[str, Any], whose: str = "") -> tuple[int, str]:
    """Number and mark of a process; (0, "") if the record is broken. `whose`: `keeper_` for that of the keeper."""
    pid, mark = record.get(f"{whose}pid"), record.get(f"{whose}mark")
    return (pid, mark) if isinstance(pid, int) and isinstance(mark, str) else (0, "")


def _is_alive(record: Mapping[str, Any]) -> bool:
    """Whether the process of a run is there, or its keeper, who has not written down its end yet."""
    return is_same(*_process_in(record)) or is_same(*_process_in(record, "keeper_"))


def _state(folder: Path, status: int | None, is_alive: bool | None, now: float) -> State:
    """`is_alive`: whether the process runs; None if that cannot be known from here."""
    # Unlike Path.exists, it never raises.
    asked, has_record = os.path.exists(folder / STOP), os.path.exists(folder / RECORD)
    if status is not None:
        return _ended(status, asked)
    if is_alive:
        return "stopping" if asked else "running"
    if is_alive is False:
        return "lost"
    if not has_record and now - _modified(folder / RUN_FILE) < STARTING_SECONDS:
        return "starting"
    changed = _modified(folder / LOG)
    if any(_modified(folder / name) >= changed > 0 for name in RESULTS):
        return "done"
    if now - max(changed, _modified(folder / HEARTBEAT)) < FRESH_SECONDS:  # a step may take longer
        return "running"
    return "lost" if has_record or os.path.exists(folder / RUN_FILE) else "unfinished"


def _ended(status: int, asked: bool) -> State:
    if status == 0:
        return "done"
    return "stopped" if asked or status == INTERRUPTED else "failed"


def files_in(folder: Path) -> list[tuple[str, int]]:
    """(path below the folder, bytes) of every file, in order. A run may remove files meanwhile."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            state = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(state.st_mode):
            name = os.fsencode(path.relative_to(folder)).decode("utf-8", "replace")
            found.append((name, state.st_size))
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, or if it is half-written."""
    try:
        with path.open("rb") as file:
            value = shown_json(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def shown_json(data: bytes) -> Any:
    """A value that a page can show. Raises `ValueError` and `RecursionError` for anything else: also for whole numbers
    beyond 64 bits, of which no float can be made, and for half of a surrogate pair."""
    value = json.loads(data, parse_int=_int64)
    if b"\\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _int64(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError("a whole number beyond 64 bits")
    return number


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines, with the `loss` of the last line that has one near the end.

    The lines before are not read. The very last line of a run that is done sums it up, and has no loss.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    last: dict[str, Any] = {}
    for line in reversed(lines[:-1]):  # behind the last line break is nothing, or half a line
        try:
            value = shown_json(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, dict):
            continue
        last = last or value
        if "loss" in value or "loss" in last:
            return last | {"loss": last.get("loss", value.get("loss"))}
    return last


def _modified(path: Path) -> float:
    """When a file was last written; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _time(value: Any) -> float:
    """Seconds since 1970; 0 for what is no time."""
    return float(value) if isinstance(value, int | float) and 0 < value < _YEAR_9999 else 0.0
