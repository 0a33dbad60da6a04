"""What libraries do at import and few runs need, put off until it is needed: transformers 5.23, accelerate 1.15,
hqq 0.2.8, bitsandbytes 0.50.

| module | at import | cost |
|---|---|---|
| `transformers` | reads all 1,700 files of its models for their `__all__` | 0.35 s |
| `transformers.trainer` | imports `datasets`, and so pandas, to recognise its tables | 0.5 s |
| `transformers.loss.*` | imports `scipy.optimize`, for losses of object detection | 0.3 s |
| `hqq.core.quantize`, `bitsandbytes` | `torch.compile` imports the compiler of torch | 1.5 s |
| `accelerate.utils.other` | imports DeepSpeed, where it is installed, to recognise its models | 1 s |

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/import_utils.py
https://github.com/dropbox/hqq/blob/master/hqq/core/quantize.py
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/backends/default/ops.py
https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/other.py

peft imports bitsandbytes and the caches of transformers import hqq wherever they are installed.
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import write_atomically
from luthier.core.importing import import_within, is_loaded
from luthier.core.paths import cache_root

LOSSES_WITH_SCIPY = ("for_object_detection", "deformable_detr", "rt_detr", "rf_detr", "grounding_dino", "lw_detr")
Structure = dict[frozenset[str], dict[str, set[str]]]
"""Libraries that names need -> module -> names, as in `define_import_structure` of transformers."""


def install() -> None:
    """For the imports of this process that are still to come. Called once by the command line."""
    import_within(
        {
            "transformers.utils.import_utils": _with_saved_index,
            "transformers.trainer": _without_datasets,
            **{f"transformers.loss.loss_{name}": _without_scipy for name in LOSSES_WITH_SCIPY},
            "accelerate.utils.other": _without_deepspeed,
            "hqq.core.quantize": _compiling_at_call,
            "bitsandbytes.backends.default.ops": _compiling_at_call,
        }
    )


# -- the index of transformers' models ---------------------------------------------------------------


@contextmanager
def _with_saved_index(module: ModuleType) -> Iterator[None]:
    yield
    names: Any = module
    names.define_import_structure = _saved(names.define_import_structure)


def _saved(define: Callable[..., Structure]) -> Callable[..., Structure]:
    """`define_import_structure`, which reads the index of the folder `models` from the cache."""

    @wraps(define)
    def defined(module_path: "str | Path", prefix: str | None = None) -> Structure:
        path = Path(module_path)
        folder = path.parent if path.is_file() else path
        if folder.parts[-2:] != ("transformers", "models"):
            return define(module_path, prefix)
        index = _index(folder, define)
        start = f"{prefix}." if prefix else ""
        return {needs: {start + name: set(given) for name, given in of.items()} for needs, of in index.items()}

    return defined


@lru_cache(maxsize=1)
def _index(folder: Path, define: Callable[..., Structure]) -> Structure:
    """From the cache, if no file of `folder` has changed since."""
    name, state = hashlib.sha256(str(folder).encode()).hexdigest()[:32], _state_of(folder)
    file = cache_root() / "transformers" / f"{name}.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["state"] == state:
            return {frozenset(needs): {name: set(given) for name, given in of.items()} for needs, of in saved["index"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none yet, or it is damaged: it is written again
    index = define(folder)
    content = [[sorted(needs), {name: sorted(given) for name, given in of.items()}] for needs, of in index.items()]
    with suppress(OutputError, RunFailed):  # a cache that cannot be written only costs time
        write_atomically(file, json.dumps({"state": state, "index": content}))
    return index


def _state_of(folder: Path) -> str:
    """A hash of the names, sizes and times of the files in `folder` and in its folders."""
    digest = hashlib.sha256()
    todo = [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name == "__pycache__":
                    continue
                if entry.is_dir():
                    todo.append(entry.path)
                state = entry.stat()
                digest.update(f"{entry.path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# -- libraries that a module imports at its top ------------------------------------------------------


@contextmanager
def _left_out(module: Any, check: str) -> Iterator[None]:
    """While it is executed, `module` finds the library of `check` (a function of `transformers.utils`) missing.

    The modules that it imports do too, and have the check itself afterwards.
    """
    utils: Any = importlib.import_module("transformers.utils")
    is_available = getattr(utils, check)
    if not is_available():
        yield
        return

    def is_left_out() -> bool:
        return False

    setattr(utils, check, is_left_out)
    try:
        yield
    finally:
        for loaded in (module, *sys.modules.values()):
            if isinstance(loaded, ModuleType) and vars(loaded).get(check) is is_left_out:
                setattr(loaded, check, is_available)


@contextmanager
def _without_scipy(module: Any) -> Iterator[None]:
    with _left_out(module, "is_scipy_available"):
        yield

    def linear_sum_assignment(*args: Any, **options: Any) -> Any:
        from scipy import optimize

        return optimize.linear_sum_assignment(*args, **options)

    module.linear_sum_assignment = linear_sum_assignment


@contextmanager
def _without_datasets(module: Any) -> Iterator[None]:
    """An object can be a table of `datasets` only once that library is loaded."""
    with _left_out(module, "is_datasets_available"):
        yield
    module.is_datasets_available = partial(is_loaded, "datasets")
    module.datasets = _Datasets("datasets")


class _Datasets(ModuleType):
    """Forwards to the library, which is loaded when this is asked."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("datasets"), name)


@contextmanager
def _without_deepspeed(module: Any) -> Iterator[None]:
    """A model can be an engine of DeepSpeed only once that library is loaded."""
    yield
    module.is_deepspeed_available = partial(is_loaded, "deepspeed")


# -- torch.compile -----------------------------------------------------------------------------------


@contextmanager
def _compiling_at_call(module: ModuleType) -> Iterator[None]:
    """Functions that the module decorates with `torch.compile` are compiled when they are first called."""
    torch: Any = sys.modules.get("torch") or importlib.import_module("torch")
    compile_now = torch.compile

    def compiled(function: "Callable[..., Any] | None" = None, **options: Any) -> Any:
        if function is None:
            return partial(compiled, **options)
        ready = lru_cache(maxsize=1)(lambda: compile_now(function, **options))

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return ready()(*args, **kwargs)

        return run

    torch.compile = compiled
    try:
        yield
    finally:
        torch.compile = compile_now
