"""What the libraries of a training run take in memory: measured by the first plan on a machine, and then remembered.

A plan itself needs few of them. The first one imports the others after its data are ready and writes what they added
to its memory into the cache. Later ones read it, if they hold the same libraries and the installed ones are the same.
"""

import hashlib
import importlib
import json
import os
import platform
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from luthier import __version__
from luthier.core.allocator import resident_bytes
from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import write_atomically
from luthier.core.importing import without_collection
from luthier.core.kinds import QUANTIZERS
from luthier.core.paths import cache_root

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

OF_TRAINING = ("luthier.training.trainer", "luthier.training.fit", "luthier.workflow.parts")


def missing_bytes(run: "TrainRun", device: str) -> int:
    """What the libraries that training on a CPU imports, and this process has not, would add to its memory. On an
    accelerator they are in the memory of the host, which is not planned."""
    names = [name for name in _names(run) if name not in sys.modules]
    if device != "cpu" or not names:
        return 0
    state = _state(names)
    file = cache_root() / "libraries" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it is not known yet, or the file is damaged: it is measured
    before = resident_bytes()
    with without_collection():
        _import(names)
    added = max(resident_bytes() - before, 0)
    with suppress(OutputError, RunFailed):  # a cache that cannot be written only costs time
        write_atomically(file, json.dumps({"bytes": added, "state": json.loads(state)}))
    return added


def _names(run: "TrainRun") -> list[str]:
    if run.quantization.quantization_bit is None:
        return [*OF_TRAINING]
    return [*OF_TRAINING, *QUANTIZERS.get(run.quantization.quantization_method).libraries]


def _import(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            if name in OF_TRAINING:
                raise
            continue  # the library may be on the machine that trains only


def _state(names: list[str]) -> str:
    """JSON of all that the bytes depend on: what is to be imported, what is loaded, and what is installed. A folder of
    packages changes when one is installed, updated or removed."""
    loaded = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
    places = [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    folders = {path: os.stat(path).st_mtime_ns for path in places}
    versions = [platform.python_version(), __version__]
    return json.dumps([names, sorted(loaded), sorted(folders.items()), versions])
