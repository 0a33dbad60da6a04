"""Files and folders that are written completely or not at all.

The content is written to a temporary path on the same disk, then renamed. So a full disk or an interrupt never leaves a
half-written file and never damages what was there before.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from luthier.core.drafts import draft_name, remove, remove_abandoned
from luthier.core.errors import OutputError, RunFailed


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file `path` by `content`. On failure, raises `OutputError` or `RunFailed` and keeps the old file."""
    data = content.encode() if isinstance(content, str) else content
    if os.path.isdir(path):  # unlike Path.is_dir, it never raises
        raise OutputError(f"{path}: this is a folder -> name a file in it")
    temporary = _neighbor(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise OutputError(
            f"{path}: its folder cannot be created ({fault.strerror or fault}) -> choose another one"
        ) from fault
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as fault:
        remove(temporary)
        raise RunFailed(f"{path}: it cannot be written ({fault.strerror or fault}); the old file is kept") from fault


_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error", "Parent directory")
"""In the text of the `RuntimeError` of a failed `torch.save`."""
_RUST_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
"""How Rust prints an OS error: its Display and its Debug form (releases of safetensors differ)."""


@contextmanager
def save_folder_atomically(
    folder: Path, *, needed_bytes: int = 0, replaces: Iterable[str] = (), outdates: Iterable[str] = ()
) -> Iterator[Path]:
    """Yields an empty folder to write into; when the block succeeds, its files are moved to `folder`.

    An existing `folder` keeps its other files, except those that match a pattern in `replaces` (e.g. `*.safetensors`),
    which belong to the old result. Those that match one in `outdates` describe it, and go before the first new file
    comes: after a kill, nothing there says that the new files are the old result.

    Raises `OutputError` if the folder cannot be created, and `RunFailed` if fewer than `needed_bytes` are free or if
    writing fails; then `folder` is unchanged.
    """
    temporary = _draft_of(folder)
    try:
        free_bytes = shutil.disk_usage(temporary).free
        if free_bytes < needed_bytes:
            raise _failed(folder, f"it needs {size(needed_bytes)} and {size(free_bytes)} are free")
        try:
            with DiskFaults():
                yield temporary
            sync(temporary)
            _move(temporary, folder, replaces, outdates)
        except OSError as fault:
            needs = f", it needs {size(needed_bytes)}" if needed_bytes else ""
            raise _failed(folder, f"{fault.strerror or fault}{needs}") from fault
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class DiskFaults:
    """A context that turns the errors libraries raise for a failed write into `OSError`.

    Libraries written in Rust (safetensors, tokenizers) put the error number into the text of their own exception or of
    a bare `Exception`; torch raises a `RuntimeError` that names its file writer, the C++ stream that it flushes at
    the end, or a folder that is gone. Our own `RunFailed` about one file of many counts too.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: object) -> None:
        if fault is None or isinstance(fault, OSError):
            return
        text = str(fault)
        if isinstance(fault, RunFailed) and isinstance(fault.__cause__, OSError):
            raise fault.__cause__
        if number := _RUST_ERROR_NUMBER.search(text):
            code = int(number[1] or number[2])
            raise OSError(code, os.strerror(code)) from fault
        if isinstance(fault, RuntimeError) and any(word in text for word in _TORCH_WRITER):
            raise OSError("it could not be written completely; the disk may be full") from fault


def size(num_bytes: float) -> str:
    """`1.234 GB`, or `56.789 MB` below one gigabyte."""
    return f"{num_bytes / 1e9:,.3f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.3f} MB"


def require_space(key: str, folder: Path, needed_bytes: int) -> None:
    """Raises `OutputError` if the disk of the existing `folder`, named by `key`, has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{key}: {folder}: the weights will take {size(needed_bytes)}, and only {size(free_bytes)} are free there"
            " -> free some space or choose another folder"
        )


def require_writable(key: str, folder: Path) -> None:
    """Check that `folder`, named by `key`, can be written to. Raises `OutputError`."""
    require_no_file(key, folder)
    try:
        _draft_of(folder).rmdir()
    except OutputError as fault:
        raise OutputError(f"{key}: {fault}") from fault


def require_no_file(key: str, folder: Path) -> None:
    """Check that no file has the name of `folder`, named by `key`. Raises `OutputError`."""
    if folder.is_file():
        raise OutputError(f"{key}: {folder}: this is a file -> name a new folder")


def require_no_folder(key: str, file: Path) -> None:
    """Check that no folder has the name of `file`, named by `key`. Raises `OutputError`."""
    if os.path.isdir(file):
        raise OutputError(f"{key}: {file}: this is a folder -> name a file in it")


def require_apart(key: str, folder: Path, sources: Iterable[str]) -> None:
    """Check that `folder`, named by `key`, is none of the `sources` that are read. Raises `OutputError`."""
    for source in sources:
        path = Path(source).expanduser()
        if path.exists() and folder.resolve() == (path.resolve().parent if path.is_file() else path.resolve()):
            raise OutputError(
                f"{key}: {folder}: this is the folder of {source}, which is read here -> name a new folder"
            )


def _draft_of(folder: Path) -> Path:
    """A new folder on the same disk as `folder`: inside it if it exists (it may be a mount point), else beside it.

    Drafts of `folder` that killed processes left are removed.
    """
    exists = folder.is_dir()
    temporary = folder / draft_name() if exists else _neighbor(folder)
    try:
        remove_abandoned(temporary.parent, "" if exists else folder.absolute().name)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as fault:
        raise OutputError(
            f"{folder}: nothing can be written there ({fault.strerror or fault}) -> choose another folder"
        ) from fault
    return temporary


def _failed(folder: Path, reason: str) -> RunFailed:
    return RunFailed(
        f"{folder}: it cannot be saved ({reason}); what was there before is kept and nothing half-written is left"
        " -> free some space or choose another folder"
    )


def _neighbor(path: Path) -> Path:
    return path.absolute().with_name(draft_name(path.absolute().name))


def sync(folder: Path) -> None:
    """Flush all files and their names to disk. A full disk may not show before."""
    for path in (folder, *folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_names(path)


def sync_names(folder: Path) -> None:
    """Flush which files are in `folder`, under which names, so that a rename outlives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.EBADF):  # network disks that have nothing to flush there
            raise
    finally:
        os.close(descriptor)


def _move(temporary: Path, folder: Path, replaces: Iterable[str], outdates: Iterable[str]) -> None:
    if not folder.exists():
        temporary.replace(folder)
        sync_names(folder.absolute().parent)
        return
    for pattern in outdates:
        for path in folder.glob(pattern):
            path.unlink()
    sync_names(folder)
    written = sorted(temporary.iterdir())
    for path in written:
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    names = {path.name for path in written}
    for pattern in replaces:
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()
    sync_names(folder)
