"""Checkpoints that are whole or not there: writing them, finding the last whole one, guarding output_dir."""

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
    """Runs a save, and adds the manifest of a checkpoint.

    A checkpoint that is not written to its end, be it for a full disk or a second Ctrl-C, is taken away again, and an
    earlier one of its name is put back. Raises `RunFailed` with what is left.
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
        last = last_whole_checkpoint(Path(output_dir), but=folder)
        kept = f"the last whole checkpoint is {last}" if last else "no checkpoint had been saved before"
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
    """Around loading a checkpoint into the model of a run. Raises `OutputError` if another kind of run made it."""
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
            f"{checkpoint}: this checkpoint does not fit the run ({reason}) -> go on with the model, finetuning_type"
            " and adapter keys that it was made with, or choose another output_dir to start anew"
        ) from fault


def check_filled(model: "nn.Module", missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Are all weights of `model` in place after a checkpoint was loaded into it? `RunFailed` if not.

    What is tied to another weight is saved once, under that one's name; the value head of ppo has a file of its own; a
    model may compute some weights itself and never save them (sinusoidal positions).
    """
    tensors, never_saved = model.state_dict(), set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    absent = {name for name in missing if not name.startswith(f"{VALUE_HEAD}.") and name not in never_saved}
    filled = {tensor.data_ptr() for name, tensor in tensors.items() if name not in absent}
    absent = {name for name in absent if name not in tensors or tensors[name].data_ptr() not in filled}
    faults = {"has no": sorted(absent), "has, and the model has not,": sorted(unexpected)}
    for verb, names in faults.items():
        if names:
            raise RunFailed(
                f"the checkpoint {verb} {names[0]}{f' and {len(names) - 1} more weights' if names[1:] else ''}"
                " -> go on with the model that it was made with, or choose another output_dir to start anew"
            )


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """In no order, whole or not."""
    return [p for p in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if p.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]


def last_whole_checkpoint(output_dir: Path, *, but: Path | None = None) -> Path | None:
    """The newest checkpoint, `but` for one, that was written to its end; newer broken ones are named in a warning."""
    others = [folder for folder in checkpoints_in(output_dir) if folder != but]
    for folder in sorted(others, key=step_of, reverse=True):
        if is_whole(folder):
            return folder
        warn(f"{folder} was not written to its end and is not used")
    return None


def is_whole(folder: Path) -> bool:
    """trainer_state.json is the last file of a checkpoint; with a manifest, every file must have its size."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        files = read_manifest(folder)["files"] if (folder / MANIFEST_NAME).exists() else {}
    except (OSError, ValueError, OutputError):
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
    word = str(asked or "").lower()
    if word not in ("", "true", "false"):
        folder = Path(str(asked)).expanduser()
        _require_whole(folder)
        if not overwrite and folder.resolve().parent != output_dir.resolve():
            _require_no_weights(output_dir)
        return folder
    wants = word == "true"
    if overwrite and not wants:
        return None
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None:
        return checkpoint
    if wants:
        raise OutputError(
            f"resume_from_checkpoint: true: {output_dir} holds no whole checkpoint -> leave it out to start anew"
        )
    _require_no_weights(output_dir)
    return None


def _require_whole(folder: Path) -> None:
    key = f"resume_from_checkpoint: {folder}"
    inner = last_whole_checkpoint(folder)
    if inner is not None:  # what stands beside the final weights looks like a checkpoint too
        raise OutputError(f"{key}: this holds checkpoints and is none itself -> did you mean {inner}?")
    if is_whole(folder):
        return
    if not folder.is_dir():
        beside = checkpoints_in(folder.parent)
        names = ", ".join(path.name for path in sorted(beside, key=step_of))
        raise OutputError(f"{key}: there is no such folder" + (f" -> choose one of {names}" if names else ""))
    raise OutputError(f"{key}: the checkpoint is not whole -> choose an earlier one")


def _require_no_weights(output_dir: Path) -> None:
    held = [path.name for pattern in WEIGHT_PATTERNS for path in output_dir.glob(pattern)]
    if held:
        raise OutputError(
            f"output_dir: {output_dir} already holds weights ({held[0]}) and no checkpoint to go on from"
            " -> choose another folder, or set overwrite_output_dir: true"
        )
