"""manifest.json: lists the files of a finished folder, so that a truncated copy or a changed file is noticed.

    {"format": 1, "created": "...Z", "versions": {"luthier": "...", "torch": "...", ...}, <the facts of the writer>,
     "files": {"model.safetensors": {"size_bytes": 123, "sha256": "..."}, ...}}

The manifest leaves out checkpoints inside the folder (`checkpoint-N/`) and drafts, which come and go, and the files of
the board, some of which are written after the run has ended.
"""

import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import luthier
from luthier.core.drafts import is_draft
from luthier.core.errors import OutputError
from luthier.core.files import write_atomically
from luthier.core.versions import library_version

MANIFEST_NAME = "manifest.json"
RUN_FILE, RECORD, CONSOLE, EXIT, STOP = "board.yaml", "board.json", "console.log", "exit.json", "stop.json"
"""What the board and sweeps keep in the folder of a run; `luthier.webui.runs` says what they are."""
_APART = re.compile(
    "|".join(map(re.escape, (MANIFEST_NAME, RUN_FILE, RECORD, CONSOLE, EXIT, STOP))) + r"|heartbeat(_\d+)?\.json"
)
"""No part of the result. The heartbeat goes when the run has ended (`luthier.training.watch.heartbeat`)."""
FORMAT = 1
CHUNK_BYTES = 1 << 20
HASHING_THREADS = 4
"""About 1 GB a second each, on one core of an EPYC; a disk is seldom faster than four of them."""
RECORDED_LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("bitsandbytes", "hqq", "deepspeed", "torchao"),
)
Item = TypeVar("Item")
Result = TypeVar("Result")


def file_sha256(path: Path, stop: Event | None = None) -> str:
    """In hexadecimal digits; of the part read so far, once `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(CHUNK_BYTES)) and not (stop is not None and stop.is_set()):
            digest.update(chunk)
    return digest.hexdigest()


def manifest_files(folder: Path) -> Iterator[Path]:
    """The files that a manifest of `folder` lists, in a fixed order."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        in_checkpoint = len(inside.parts) > 1 and inside.parts[0].startswith("checkpoint-")
        is_part = not in_checkpoint and not is_draft(inside.parts[0]) and not _APART.fullmatch(str(inside))
        if is_part and path.is_file():
            yield path


def versions_here() -> dict[str, str]:
    """Of Python, luthier and the libraries that decide what is computed, as far as they are installed."""
    versions = {"python": platform.python_version(), "luthier": luthier.__version__}
    return versions | {name: found for name in RECORDED_LIBRARIES if (found := library_version(name)) is not None}


def write_manifest(folder: str | os.PathLike[str], **facts: Any) -> Path:
    """Write the manifest of the finished `folder`, atomically. Returns its path.

    `facts` (seeds, data fingerprint, source model, ...) are written as JSON as they are.
    """
    root = Path(folder)
    content = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions_here(),
        **facts,
        "files": dict(_for_each(lambda path, stop: _record(root, path, stop), manifest_files(root))),
    }
    write_atomically(root / MANIFEST_NAME, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    return root / MANIFEST_NAME


def _record(root: Path, path: Path, stop: Event) -> tuple[str, dict[str, Any]]:
    return path.relative_to(root).as_posix(), {"size_bytes": path.stat().st_size, "sha256": file_sha256(path, stop)}


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of `folder`. Raises `OutputError` without a folder or a readable manifest."""
    root = Path(folder)
    if not os.path.isdir(root):  # unlike Path.is_dir, it never raises
        raise OutputError(f"{root}: no such folder")
    path = root / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise OutputError(f"{root}: holds no {MANIFEST_NAME}, so there is nothing to compare it with") from error
    except ValueError as error:
        raise OutputError(f"{path}: is not a manifest: {error}") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error})") from error
    match content:
        case {"files": dict(files)} if all(_is_record(record) for record in files.values()):
            return content
    raise OutputError(f"{path}: is not a manifest: it holds no `files` with their size_bytes and sha256")


def renew_manifest(folder: str | os.PathLike[str]) -> Path:
    """Takes in what has been added to a finished folder; the facts stay those of its manifest."""
    earlier = read_manifest(folder)
    facts = {name: value for name, value in earlier.items() if name not in ("format", "created", "versions", "files")}
    return write_manifest(folder, **facts)


def record_again(folder: str | os.PathLike[str], paths: Iterable[Path]) -> None:
    """Takes in files that were written to a finished folder since; the records of all others stay as they are."""
    root, content = Path(folder), read_manifest(folder)
    content["files"] |= dict(_for_each(lambda path, stop: _record(root, path, stop), paths))
    write_atomically(root / MANIFEST_NAME, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _is_record(value: Any) -> bool:
    match value:
        case {"size_bytes": int(), "sha256": str()}:
            return True
    return False


def verify_folder(folder: str | os.PathLike[str], *, hashes: bool = True) -> list[str]:
    """What differs between `folder` and its manifest, one line per file; empty if nothing does.

    Files that the manifest does not list are ignored: people add notes, and training adds checkpoints. `hashes` false:
    files of the same size count as the same, and none is read.
    """
    root = Path(folder)
    recorded = read_manifest(root)["files"]
    found = _for_each(lambda name, stop: _finding(root / name, name, recorded[name], stop, hashes), recorded)
    return [finding for finding in found if finding is not None]


def _finding(path: Path, name: str, recorded: Mapping[str, Any], stop: Event, hashes: bool) -> str | None:
    size_bytes = recorded["size_bytes"]
    try:
        if not path.is_file():
            return f"{name}: missing"
        if (actual := path.stat().st_size) < size_bytes:
            return f"{name}: truncated, {actual} of {size_bytes} bytes"
        if actual > size_bytes:
            return f"{name}: changed, {actual} bytes instead of {size_bytes}"
        if hashes and file_sha256(path, stop) != recorded["sha256"]:
            return f"{name}: changed, same size but another sha256"
    except OSError as fault:
        return f"{name}: cannot be read ({fault.strerror or fault})"
    return None


def _for_each(work: Callable[[Item, Event], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of each item, in order. Hashing releases the interpreter, so threads use several cores.

    `work` ends early once its event is set, which an interrupt does.
    """
    stop = Event()
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        try:
            return list(threads.map(lambda item: work(item, stop), items))
        finally:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
