"""manifest.json: lists the files of a finished folder, so that a truncated copy or a changed file is noticed.

    {"format": 1, "created": "...Z", "versions": {"luthier": "...", "torch": "...", ...}, <the facts of the writer>,
     "files": {"model.safetensors": {"size_bytes": 123, "sha256": "..."}, ...}}

The manifest leaves out checkpoints inside the folder (`checkpoint-N/`), which come and go.
"""

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import luthier
from luthier.core.errors import OutputError
from luthier.core.files import write_atomically
from luthier.core.versions import library_version

MANIFEST_NAME = "manifest.json"
FORMAT = 1
RECORDED_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_files(folder: Path) -> Iterator[Path]:
    """The files that a manifest of `folder` lists, in a fixed order."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        in_checkpoint = len(inside.parts) > 1 and inside.parts[0].startswith("checkpoint-")
        if path.is_file() and not in_checkpoint and str(inside) != MANIFEST_NAME:
            yield path


def write_manifest(folder: str | os.PathLike[str], **facts: Any) -> Path:
    """Write the manifest of the finished `folder`, atomically. Returns its path.

    `facts` (seeds, data fingerprint, source model, ...) are written as JSON as they are.
    """
    root = Path(folder)
    versions = {"python": platform.python_version(), "luthier": luthier.__version__}
    versions |= {name: found for name in RECORDED_LIBRARIES if (found := library_version(name)) is not None}
    content = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions,
        **facts,
        "files": {
            path.relative_to(root).as_posix(): {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in manifest_files(root)
        },
    }
    write_atomically(root / MANIFEST_NAME, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    return root / MANIFEST_NAME


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of `folder`. Raises `OutputError` without a folder or a readable manifest."""
    root = Path(folder)
    if not root.is_dir():
        raise OutputError(f"{root}: no such folder")
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise OutputError(f"{root}: holds no {MANIFEST_NAME}, so there is nothing to compare it with")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path}: is not a manifest: {error}") from error
    match content:
        case {"files": dict(files)} if all(_is_record(record) for record in files.values()):
            return content
    raise OutputError(f"{path}: is not a manifest: it holds no `files` with their size_bytes and sha256")


def renew_manifest(folder: str | os.PathLike[str]) -> Path:
    """Takes in what has been added to a finished folder; the facts stay those of its manifest."""
    earlier = read_manifest(folder)
    facts = {name: value for name, value in earlier.items() if name not in ("format", "created", "versions", "files")}
    return write_manifest(folder, **facts)


def _is_record(value: Any) -> bool:
    match value:
        case {"size_bytes": int(), "sha256": str()}:
            return True
    return False


def verify_folder(folder: str | os.PathLike[str]) -> list[str]:
    """What differs between `folder` and its manifest, one line per file; empty if nothing does.

    Files that the manifest does not list are ignored: people add notes, and training adds checkpoints.
    """
    root = Path(folder)
    findings = []
    for name, recorded in read_manifest(root)["files"].items():
        path, size_bytes = root / name, recorded["size_bytes"]
        if not path.is_file():
            findings.append(f"{name}: missing")
        elif (actual := path.stat().st_size) < size_bytes:
            findings.append(f"{name}: truncated, {actual} of {size_bytes} bytes")
        elif actual > size_bytes:
            findings.append(f"{name}: changed, {actual} bytes instead of {size_bytes}")
        elif file_sha256(path) != recorded["sha256"]:
            findings.append(f"{name}: changed, same size but another sha256")
    return findings
