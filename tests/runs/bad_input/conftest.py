"""One small world for all cases; every case has a folder of its own, and nobody writes into the world."""

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs.bad_input.clumsy import Person
from tests.small_world import small_world


@pytest.fixture(scope="session")
def small_keys(tmp_path_factory) -> dict[str, Any]:
    keys = small_world(tmp_path_factory.mktemp("world") / "small world")
    return {name: value for name, value in keys.items() if name != "overwrite_output_dir"} | {"max_steps": 2}


@pytest.fixture
def person(small_keys, tmp_path, capsys, monkeypatch) -> Person:
    for name in ("LUTHIER_DEBUG", "FORCE_TORCHRUN", "LOCAL_RANK", "ALLOW_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return Person(small_keys, tmp_path, capsys)


@pytest.fixture
def model(person) -> Path:
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(person.keys["model_name_or_path"], person.folder / "my model"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many kilobytes; the weights of the model take 451 of them, a checkpoint 1,420."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk of {size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    gc.collect()  # the errors of libraries hold open files, in cycles
    for folder in mounted:
        # A process that was forked meanwhile may hold an open file for a moment longer.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
