"""Checkpoints: writing them atomically, finding the last complete one, protecting output_dir."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import DiskFaults, sync
from luthier.core.log import warn
from luthier.core.manifest import MANIFEST_NAME, read_manifest, write_manifest
from luthier.model.heads.score_head import VALUE_HEAD

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT_PREFIX = "checkpoint-"
WEIGHT_PATTERNS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")


@contextmanager
def saving(output_dir: str, checkpoint: str | None, is_writer: bool) -> Iterator[None]:
    """Wraps a save and adds the manifest of a checkpoint.

    If a checkpoint cannot be completed (a full disk, a second Ctrl-C), it is removed and an earlier one of the same
    name is restored. Raises `RunFailed` that names the last complete checkpoint.
    """
    folder = Path(output_dir, checkpoint) if checkpoint else Path(output_dir)
    cleans_up = bool(checkpoint) and is_writer
    earlier = folder.with_name(f".{folder.name}.earlier")
    if cleans_up and folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.replace(earlier)
    is_saved = False
    try:
        with DiskFaults():
            yield
        if cleans_up:
            sync(folder)
            is_saved = True
            write_manifest(folder)
    except OSError as error:
        last = last_complete_checkpoint(Path(output_dir), exclude=folder)
        kept = f"the last complete checkpoint is {last}" if last else "no checkpoint was saved before"
        raise RunFailed(
            f"cannot save to {folder}: {error.strerror or error}; {kept}"
            " -> free some space or choose another output_dir, then resume"
        ) from error
    finally:
        if cleans_up and not is_saved:
            shutil.rmtree(folder, ignore_errors=True)
            if earlier.exists():
                earlier.replace(folder)
        elif cleans_up:
            shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def checkpoint_mismatch(checkpoint: str) -> Iterator[None]:
    """Wraps loading a checkpoint into a run's model. Raises `OutputError` if it was saved by another kind of run."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as fault:
        lines = [line.strip() for line in str(fault).splitlines()]
        reason = next((line for line in lines if "mismatch" in line), lines[0] if lines else type(fault).__name__)
        raise OutputError(
            f"{checkpoint}: this checkpoint does not match the run ({reason}) -> use the model, finetuning_type and"
            " adapter keys that it was trained with, or choose another output_dir to start from scratch"
        ) from fault


def check_filled(model: "nn.Module", missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises `RunFailed` if a loaded checkpoint did not fill all weights of `model`, or has weights of another model.

    Missing names are fine for tied weights, which are saved once, for the value head of ppo, which has its own file,
    and for weights that the model computes and never saves (sinusoidal positions).
    """
    tensors, never_saved = model.state_dict(), set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    absent = {name for name in missing if not name.startswith(f"{VALUE_HEAD}.") and name not in never_saved}
    filled = {tensor.data_ptr() for name, tensor in tensors.items() if name not in absent}
    absent = {name for name in absent if name not in tensors or tensors[name].data_ptr() not in filled}
    faults = {"has no weight": sorted(absent), "has an unexpected weight": sorted(unexpected)}
    for fault, names in faults.items():
        if names:
            raise RunFailed(
                f"the checkpoint {fault} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
                " -> use the model that it was trained with, or choose another output_dir to start from scratch"
            )


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """In any order, complete or not."""
    return [p for p in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if p.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]


def last_complete_checkpoint(output_dir: Path, *, exclude: Path | None = None) -> Path | None:
    """The newest complete checkpoint other than `exclude`. Warns about newer incomplete ones."""
    others = [folder for folder in checkpoints_in(output_dir) if folder != exclude]
    for folder in sorted(others, key=step_of, reverse=True):
        if is_complete(folder):
            return folder
        warn(f"{folder} is incomplete and is not used")
    return None


def is_complete(folder: Path) -> bool:
    """trainer_state.json, the last file of a checkpoint, exists; with a manifest, all files have the sizes in it."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        files = read_manifest(folder)["files"] if (folder / MANIFEST_NAME).exists() else {}
    except (OSError, ValueError, OutputError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == facts["size_bytes"]
        for name, facts in files.items()
    )


def resume_point(output_dir: Path, requested: str | bool | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from: the requested one (`resume_from_checkpoint`), else the last one in `output_dir`.

    None means to start from scratch. Raises `OutputError` if this run would overwrite finished weights, or if the
    requested checkpoint is missing or incomplete.
    """
    word = str(requested or "").lower()
    if word not in ("", "true", "false"):
        folder = Path(str(requested)).expanduser()
        _require_complete(folder)
        if not overwrite and folder.resolve().parent != output_dir.resolve():
            _require_no_weights(output_dir)
        return folder
    must_resume = word == "true"
    if overwrite and not must_resume:
        return None
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        return checkpoint
    if must_resume:
        raise OutputError(
            f"resume_from_checkpoint: true: {output_dir} has no complete checkpoint"
            " -> leave it out to start from scratch"
        )
    _require_no_weights(output_dir)
    return None


def _require_complete(folder: Path) -> None:
    key = f"resume_from_checkpoint: {folder}"
    inner = last_complete_checkpoint(folder)
    if inner is not None:  # an output folder with final weights looks like a checkpoint too
        raise OutputError(f"{key}: this folder contains checkpoints but is not one -> did you mean {inner}?")
    if is_complete(folder):
        return
    if not folder.is_dir():
        siblings = checkpoints_in(folder.parent)
        names = ", ".join(path.name for path in sorted(siblings, key=step_of))
        raise OutputError(f"{key}: there is no such folder" + (f" -> choose one of {names}" if names else ""))
    raise OutputError(f"{key}: the checkpoint is incomplete -> choose an earlier one")


def _require_no_weights(output_dir: Path) -> None:
    held = [path.name for pattern in WEIGHT_PATTERNS for path in output_dir.glob(pattern)]
    if held:
        raise OutputError(
            f"output_dir: {output_dir} already holds weights ({held[0]}) and no checkpoint to resume from"
            " -> choose another folder, or set overwrite_output_dir: true"
        )
