"""The run files below the root: those that can be loaded into a form, and saving one under a name."""

import json
import os
from pathlib import Path

import yaml

from luthier.config.decode import Loader
from luthier.config.encode import to_yaml
from luthier.config.source import SUFFIXES
from luthier.core.errors import InvalidInput, OutputError
from luthier.core.files import write_atomically
from luthier.webui import llamaboard
from luthier.webui.runs import is_shown

MAX_DEPTH = 3
MAX_FILES = 300
MAX_BYTES = 1 << 20
MAX_NAME_BYTES = 200
"""Of what is saved. File systems take 255, of which a draft needs some for its own name."""
_HEAD_BYTES = 4096
_KEYS = (b"model_name_or_path", b"stage", b"top.model_name", b"train.")


def run_files(root: Path) -> list[str]:
    """The paths below `root` of what looks like run files, to be offered."""
    found: list[str] = []
    for folder, inner, names in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        inner[:] = sorted(n for n in inner if not n.startswith((".", "checkpoint-", "__"))) if depth < MAX_DEPTH else []
        inner[:] = [name for name in inner if is_shown(os.path.join(folder, name))]
        if "pyvenv.cfg" in names:
            inner.clear()
            continue
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(SUFFIXES) and _looks_like_one(path) and is_shown(str(path)):
                found.append(path.relative_to(root).as_posix())
                if len(found) == MAX_FILES:
                    return found
    return found


def _looks_like_one(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return any(key in head for key in _KEYS)


def load(path: Path) -> str:
    """The text of a run file of luthier or LLaMA-Factory, or what a llamaboard_config says as such a text.

    Raises `InvalidInput` if it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidInput(f"{path}: is too large for a run file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: is not UTF-8 text") from None
    except OSError as fault:
        raise InvalidInput(f"{path}: cannot be read ({fault.strerror})") from fault
    if path.suffix == ".json":
        return _as_run_file(_json_as_yaml(path, text))
    return _as_run_file(text)


def save(root: Path, name: str, text: str) -> Path:
    """Write a run file called `name` into `root`. Raises `OutputError` if it exists, or the name is none."""
    name = name.strip().removesuffix(".yaml")
    is_name = name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES and Path(name).name == name
    if not name or not is_name or name.startswith("."):
        raise OutputError(f"{name[:80] or 'the name'}: is not the name of a file -> write e.g. my-run")
    path = root / f"{name}.yaml"
    if path.exists():
        raise OutputError(f"{path.name}: exists already -> choose another name")
    write_atomically(path, text)
    return path


def _json_as_yaml(path: Path, text: str) -> str:
    try:
        return to_yaml(json.loads(text))
    except (ValueError, RecursionError) as fault:
        raise InvalidInput(f"{path}: is not valid JSON: {fault}") from None


def _as_run_file(text: str) -> str:
    """A llamaboard_config as a run file; other texts stay as they are."""
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError):  # as in `luthier.config.source`, which says what is wrong
        return text
    return llamaboard.run_text(value) if llamaboard.is_config(value) else text
