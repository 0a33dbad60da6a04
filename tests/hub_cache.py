"""A repository of the Hugging Face hub as its cache on disk has it: no network is needed to load it by its name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(folder: Path, name: str, cache: Path, *, which: Callable[[Path], bool] = Path.is_file) -> Path:
    """The files of `folder` that `which` chooses, as the repository `name`; returns the folder of its commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for part in (snapshot, repository / "refs", repository / "blobs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file() and which(path))):
        blob = repository / "blobs" / str(number)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot
