"""Checkpoints: writing them so that one is whole at every moment, choosing the one to resume from, removing old ones.

A checkpoint is whole if and only if `luthier verify` accepts it: it has a manifest, and all files in it have their
sha256. The order of a save, in which the process may be killed anywhere:

    .checkpoints.PID.HOST.tmp/checkpoint-8/    every process writes its files here
                                               files are flushed, then the manifest is written and flushed
    checkpoint-8/                              the folder is renamed, and the rename is flushed
    .checkpoint-4.PID.HOST.tmp                 only then are old checkpoints renamed, and removed
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.drafts import draft_name, remove_abandoned, runs_here, this_host
from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import DiskFaults, size, sync, sync_names
from luthier.core.log import info, warn
from luthier.core.manifest import MANIFEST_NAME, read_manifest, verify_folder, write_manifest
from luthier.training.checkpoints.foreign import TRAINER_STATE, WEIGHT_PATTERNS, is_readable_foreign

if TYPE_CHECKING:
    from luthier.training.checkpoints.shared_save import SharedSave

CHECKPOINT_PREFIX = "checkpoint-"
STATES = {
    "optimizer": ("optimizer*", "rank*-optimizer*", "global_step*"),
    "learning rate schedule": ("scheduler.pt", "global_step*"),
    "random numbers": ("rng_state*",),
}
"""What training continues from, and the files that hold it; DeepSpeed puts all of it into `global_stepN/`."""
NO_FOLDER, FROM_SCRATCH = "there is no such folder", "leave it out to start from scratch"
LONG_CHECK_BYTES = 2_000_000_000
_SET_ASIDE = re.compile(r"\.(checkpoint-\d+)(?:\.(\d{1,9})\.(h[0-9a-f]{7}))?\.earlier")
"""`.checkpoint-8.PID.HOST.earlier`; earlier versions wrote neither process nor host."""


class NoCheckpoint(OutputError):
    """There is no checkpoint to resume from on this machine."""


class NotSaved(RunFailed):
    """The disk has failed during a save. What was saved before is still there."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"{fault} -> free some space or choose another output_dir, then resume")
        self.fault = fault


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Wraps a save to `folder`. Raises `NotSaved` that names the last whole checkpoint if the disk fails."""
    try:
        with DiskFaults():
            yield
    except OSError as error:
        raise NotSaved(sentence(folder, error)) from error


def sentence(folder: Path, error: OSError) -> str:
    """Why there is no checkpoint `folder`, and which one there is."""
    output_dir = folder.parent if folder.name.startswith(CHECKPOINT_PREFIX) else folder
    last = newest_whole(output_dir)
    kept = f"the last complete checkpoint is {last}" if last else "no checkpoint was saved before"
    return f"cannot save to {folder}: {error.strerror or error}; {kept}"


@contextmanager
def writing(draft: Path, folder: Path, share: "SharedSave") -> Iterator[None]:
    """Wraps writing a checkpoint to `draft`, an empty folder; when the block succeeds it becomes `folder`.

    All processes that share the disk write to one draft, and its one writer moves it, once those of all machines have
    theirs on disk. `folder` is replaced only by a whole checkpoint: if anything fails, or the process is killed, an
    earlier one of the same name is still there.
    """
    try:
        with share.noting():
            if share.is_writer:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        share.agree()
        yield
        share.agree()
        with share.noting():
            if share.is_writer:
                sync(draft)
                write_manifest(draft)
                sync_names(draft)
        share.agree()
        with share.noting():
            if share.is_writer:
                stamps = _stamps(draft)
                _move(draft, folder)
                _known_whole[folder] = stamps
        share.agree()
    finally:
        if share.is_writer:
            shutil.rmtree(draft.parent, ignore_errors=True)


def _move(draft: Path, folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{this_host()}.earlier")
    if folder.exists():
        folder.replace(aside)
    try:
        draft.replace(folder)
    finally:
        if aside.exists() and not folder.exists():
            aside.replace(folder)
    sync_names(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(output_dir: Path) -> None:
    """Remove what processes that have ended left in `output_dir`.

    After a kill between the two renames of a checkpoint that was to be replaced, the earlier one gets its name again.
    Every process of a run may do this at the same time.
    """
    for aside in output_dir.glob(f".{CHECKPOINT_PREFIX}*.earlier"):
        match = _SET_ASIDE.fullmatch(aside.name)
        if match is None or (match[3] == this_host() and runs_here(int(match[2]))):
            continue
        folder = output_dir / match[1]
        try:
            if not folder.exists():
                aside.replace(folder)
            elif is_whole(folder):
                shutil.rmtree(aside, ignore_errors=True)
        except OSError:  # another process was faster
            continue
    remove_abandoned(output_dir)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first, so what is left after a kill is not taken for a checkpoint."""
    aside = folder.with_name(draft_name(folder.name))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.replace(aside)
    except FileNotFoundError:
        return
    except OSError as fault:
        warn(f"{folder} cannot be removed ({fault.strerror or fault})")
    shutil.rmtree(aside, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: Path | None) -> None:
    """Remove the oldest whole checkpoints beside `newest`, which was just written, until `limit` are left.

    `newest` and `best` stay in any case. The step tells the age: a copy or a removal that was cut short changes time
    stamps. Checkpoints of later steps are of a run that has been resumed from an earlier step since, and go first.
    """
    if not limit or limit < 0:
        return
    whole = [folder for folder in checkpoints_in(newest.parent) if folder == newest or is_whole(folder)]
    kept = {folder for folder in whole if folder == newest or (best is not None and folder.resolve() == best.resolve())}
    oldest_first = sorted(whole, key=lambda folder: (step_of(folder) <= step_of(newest), step_of(folder)))
    surplus = len(whole) - max(limit, len(kept))
    for folder in [folder for folder in oldest_first if folder not in kept][: max(surplus, 0)]:
        remove(folder)


Stamps = tuple[tuple[str, int, int], ...]
"""Name, size in bytes and time of the last change in nanoseconds of each file."""
_known_whole: dict[Path, Stamps] = {}
"""Checkpoints that this process has written or verified, as their files were then."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a folder is not a whole checkpoint."""

    state: str
    """incomplete, damaged or unreadable"""
    reason: str

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def fault_of(folder: Path, *, hashes: bool = True) -> Fault | None:
    """What keeps `folder` from being a whole checkpoint, in the words of `luthier verify`; reads all its files.

    `hashes` false: only the sizes of the files are compared, which takes no time.
    """
    try:
        (folder / MANIFEST_NAME).stat()
    except (FileNotFoundError, NotADirectoryError):
        return Fault("incomplete", f"it has no {MANIFEST_NAME}")
    except OSError as fault:  # the folder of another user, which may be listed but not entered
        return Fault("unreadable", fault.strerror or str(fault))
    try:
        num_bytes = sum(recorded["size_bytes"] for recorded in read_manifest(folder)["files"].values())
        if hashes and num_bytes > LONG_CHECK_BYTES:
            info(f"verifying {folder} ({size(num_bytes)})")
        stamps, findings = _stamps(folder), verify_folder(folder, hashes=hashes)
    except OutputError as fault:
        return Fault("damaged", str(fault))
    except OSError as fault:
        return Fault("unreadable", fault.strerror or str(fault))
    if findings:
        state = "damaged" if all(": changed" in finding for finding in findings) else "incomplete"
        return Fault(state, findings[0] + (f", and {len(findings) - 1} more" if findings[1:] else ""))
    if not _has_state(folder):
        return Fault("incomplete", f"it has no readable {TRAINER_STATE}, so it is not a checkpoint of a training run")
    if hashes:
        _known_whole[folder] = stamps
    return None


def _has_state(folder: Path) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return type(json.loads((folder / TRAINER_STATE).read_bytes())["global_step"]) is int
    return False


def is_whole(folder: Path) -> bool:
    """As `fault_of`, but does not read files again that this process has written or verified and nobody has changed."""
    with suppress(OSError):  # `fault_of` says why it cannot be read
        if _known_whole.get(folder) == _stamps(folder):
            return True
    return fault_of(folder) is None


def require_whole_best(folder: Path) -> None:
    """Raises `RunFailed` if the best checkpoint cannot be loaded as it was saved."""
    fault = fault_of(folder)
    if fault is not None:
        raise RunFailed(
            f"load_best_model_at_end: the best checkpoint {folder} is {fault}; the other checkpoints are kept"
            " -> set load_best_model_at_end: false to keep the weights of the last step"
        )


def _stamps(folder: Path) -> Stamps:
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for path, stat in files)


def missing_states(folder: Path) -> list[str]:
    """What training cannot continue from this checkpoint, in words: optimizer, learning rate schedule, ..."""
    return [name for name, patterns in STATES.items() if not any(any(folder.glob(p)) for p in patterns)]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """In any order, whole or not."""
    return [p for p in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if p.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]


def newest_whole(output_dir: Path, *, until_step: int | None = None) -> Path | None:
    """The whole checkpoint of the latest step, up to `until_step`. Warns about later ones that are not whole."""
    folder, notes = _newest_whole(output_dir, until_step=until_step)
    for note in notes:
        warn(note)
    return folder


def _newest_whole(
    output_dir: Path, *, until_step: int | None = None, hashes: bool = True
) -> tuple[Path | None, list[str]]:
    """The same, and what it warns of."""
    folders = [folder for folder in checkpoints_in(output_dir) if until_step is None or step_of(folder) <= until_step]
    notes: list[str] = []
    for folder in sorted(folders, key=step_of, reverse=True):
        fault = fault_of(folder, hashes=hashes)
        if fault is None:
            return folder, notes
        notes.append(f"{folder} is {fault.state} and is not used: {fault.reason}")
    return None, notes


def resume_point(output_dir: Path, requested: str | bool | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from: the requested one (`resume_from_checkpoint`), else the last one in `output_dir`.

    None means to start from scratch. Raises `OutputError` if this run would overwrite finished weights, or if the
    requested checkpoint is missing or not whole.
    """
    folder, notes = find_resume_point(output_dir, requested, overwrite)
    for note in notes:
        warn(note)
    return folder


def find_resume_point(
    output_dir: Path, requested: str | bool | None, overwrite: bool, *, hashes: bool = True
) -> tuple[Path | None, list[str]]:
    """As `resume_point`, and what that warns of. `hashes` as in `fault_of`. Raises `NoCheckpoint` for a missing one."""
    word = str(requested or "").lower()
    if word not in ("", "true", "false"):
        folder = Path(str(requested)).expanduser()
        notes = _require_whole(folder, hashes=hashes)
        is_elsewhere = folder.resolve().parent != output_dir.resolve()
        if not overwrite and is_elsewhere:
            require_no_weights(output_dir)
        later = [] if is_elsewhere else [f for f in checkpoints_in(output_dir) if step_of(f) > step_of(folder)]
        if later:
            notes.append(
                f"{output_dir} also holds later checkpoints ({_names(later)}), which a run without"
                " resume_from_checkpoint would resume from -> choose another output_dir or remove them"
            )
        return folder, notes
    must_resume = word == "true"
    if overwrite and not must_resume:
        return None, []
    checkpoint, notes = _newest_whole(output_dir, hashes=hashes)
    if checkpoint is not None:
        return checkpoint, notes
    if must_resume:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise (OutputError if notes else NoCheckpoint)(
            f"resume_from_checkpoint: true: {none_in(output_dir)}{why} -> {FROM_SCRATCH}"
        )
    require_no_weights(output_dir)
    if found := checkpoints_in(output_dir):
        notes.append(
            f"{none_in(output_dir)} ({_names(found)}), so training starts from scratch"
            f" -> resume_from_checkpoint: {found[0].with_name('checkpoint-N')} resumes from one of another program"
        )
    return None, notes


def _names(folders: Iterable[Path]) -> str:
    return ", ".join(folder.name for folder in sorted(folders, key=step_of))


def none_in(output_dir: Path | str) -> str:
    return f"{output_dir} has no complete checkpoint"


def others_than(folder: Path) -> str:
    """The remedy for a checkpoint that is not there."""
    names = _names(checkpoints_in(folder.parent))
    return f"choose one of {names}" if names else "correct the path, or leave it out"


def _require_whole(folder: Path, *, hashes: bool) -> list[str]:
    """What to warn of."""
    key = f"resume_from_checkpoint: {folder}"
    if not os.path.isdir(folder):  # unlike Path.is_dir, it never raises
        raise NoCheckpoint(f"{key}: {NO_FOLDER} -> {others_than(folder)}")
    inner, notes = _newest_whole(folder, hashes=hashes)
    if inner is not None:  # an output folder with final weights looks like a checkpoint too
        raise OutputError(f"{key}: this folder contains checkpoints but is not one -> did you mean {inner}?")
    fault = None if is_readable_foreign(folder) else fault_of(folder, hashes=hashes)
    if fault is None:
        return notes
    if fault.state == "incomplete" and not (folder / MANIFEST_NAME).is_file():
        raise OutputError(
            f"{key}: {fault.reason}: the checkpoint is incomplete -> choose an earlier one; {_record_hint(folder)}"
        )
    raise OutputError(f"{key}: {fault.reason}: the checkpoint is {fault.state} -> choose an earlier one")


def _record_hint(folder: Path) -> str:
    return f"if another program wrote it, `luthier verify --record {folder}` accepts its files as they are"


def require_no_weights(output_dir: Path) -> None:
    """Raises `OutputError` if a finished model would be overwritten."""
    held = [path.name for pattern in WEIGHT_PATTERNS for path in output_dir.glob(pattern)]
    if held:
        raise OutputError(
            f"output_dir: {output_dir} already holds weights ({held[0]}) and no checkpoint to resume from"
            " -> choose another folder, or set overwrite_output_dir: true"
        )
