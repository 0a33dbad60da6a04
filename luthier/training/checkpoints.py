"""Checkpoints that are whole or not there: writing them, finding the last whole one, guarding output_dir."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.core.errors import OutputError, RunFailed
from luthier.core.log import warn
from luthier.core.manifest import write_manifest

CHECKPOINT_PREFIX = "checkpoint-"
WEIGHT_PATTERNS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")


@contextmanager
def saving(output_dir: str, checkpoint: str | None, is_writer: bool) -> Iterator[None]:
    """Runs a save. If it fails, removes the half-written checkpoint and says what is left; else adds its manifest."""
    from safetensors import SafetensorError

    folder = Path(output_dir, checkpoint) if checkpoint else Path(output_dir)
    try:
        if checkpoint and is_writer and folder.exists():
            shutil.rmtree(folder)  # of an earlier run: its files would mix with the new ones
        yield
        if checkpoint and is_writer:
            write_manifest(folder)
    except (OSError, SafetensorError) as error:
        if checkpoint:
            shutil.rmtree(folder, ignore_errors=True)
        last = last_whole_checkpoint(Path(output_dir))
        kept = f"the last whole checkpoint is {last}" if last else "no checkpoint had been saved before"
        raise RunFailed(
            f"cannot save to {folder}: {error}; {kept} -> free some space or choose another output_dir, then resume"
        ) from error


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """In no order, whole or not."""
    return [p for p in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if p.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end; newer broken ones are named in a warning."""
    for folder in sorted(checkpoints_in(output_dir), key=step_of, reverse=True):
        if is_whole(folder):
            return folder
        warn(f"{folder} was not written to its end and is not used")
    return None


def is_whole(folder: Path) -> bool:
    """trainer_state.json is the last file of a checkpoint; with a manifest, every file must have its size."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        manifest = folder / "manifest.json"
        if not manifest.exists():
            return True
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == facts["size_bytes"]
        for name, facts in files.items()
    )


def resume_point(output_dir: Path, asked: str | bool | None, overwrite: bool) -> Path | None:
    """Where training goes on: the checkpoint asked for, else the last one in `output_dir`, else the beginning.

    Raises `OutputError` if the folder holds finished weights that this run would write over, or if the checkpoint asked
    for is not there or not whole.
    """
    if isinstance(asked, str) and asked.lower() not in ("true", "false"):
        folder = Path(asked)
        if not folder.is_dir():
            raise OutputError(f"resume_from_checkpoint: {asked}: there is no such folder")
        if not is_whole(folder):
            raise OutputError(f"resume_from_checkpoint: {asked}: the checkpoint is not whole -> choose an earlier one")
        return folder
    wants = asked is True or (isinstance(asked, str) and asked.lower() == "true")
    if overwrite and not wants:
        return None
    checkpoint = last_whole_checkpoint(output_dir) if output_dir.is_dir() else None
    if checkpoint is not None:
        return checkpoint
    if wants:
        raise OutputError(
            f"resume_from_checkpoint: true: {output_dir} holds no whole checkpoint -> leave it out to start anew"
        )
    held = [path.name for pattern in WEIGHT_PATTERNS for path in output_dir.glob(pattern)]
    if held:
        raise OutputError(
            f"output_dir: {output_dir} already holds weights ({held[0]}) and no checkpoint to go on from"
            " -> choose another folder, or set overwrite_output_dir: true"
        )
    return None


def require_writable(output_dir: Path) -> None:
    """Creates the folder and tries to write into it, before anything expensive happens."""
    probe = output_dir / ".luthier-write-test"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"output_dir: cannot write to {output_dir}: {error} -> choose another folder") from error
