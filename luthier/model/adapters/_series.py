"""Adapters in series: one that was trained on top of others names them, and is put on nothing else.

    adapter_name_or_path: first
    create_new_adapter: true
    output_dir: second          -> second/adapter_trained_on.json: {"adapters": [{"path": "first", "sha256": "..."}]}

`second` was trained on W + B1 A1, so on W alone it computes something else. Folders may move: they are compared by
the sha256 of their weights. `luthier export` writes the same list into the manifest of a merged model, whose adapters
count as if they were given before all others. Nothing here imports torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError, OutputError
from luthier.core.manifest import MANIFEST_NAME, file_sha256, read_manifest
from luthier.model.files.sources import ADAPTER_WEIGHTS, ModelSource, read_json

if TYPE_CHECKING:
    from torch import nn

SERIES_FILE = "adapter_trained_on.json"
MERGED = "merged_adapters"
"""The entry in the manifest of a model that adapters were merged into."""
_RECORD = "adapters_beneath"
"""The attribute of a model with an adapter that holds the adapters which that one is trained on."""


@dataclass(frozen=True, slots=True)
class Beneath:
    """An adapter that was merged into the weights that another one was trained on."""

    path: str
    """As the run named it."""
    sha256: str
    """Of the file of its weights."""


Series = tuple[Beneath, ...]
"""In the order in which they were merged."""


def beneath(names: Sequence[str], folders: Sequence[Path]) -> Series:
    """What stands for adapters that a run names. `folders`: of each, where it lies on this machine."""
    return tuple(Beneath(name, _sha256(folder)) for name, folder in zip(names, folders, strict=True))


def _sha256(folder: Path) -> str:
    return file_sha256(next(folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()))


def as_json(series: Series) -> list[dict[str, str]]:
    return [asdict(one) for one in series]


def _from_json(content: Any, file: Path) -> Series:
    """Raises `ModelError` if it is no such list."""
    try:
        return tuple(Beneath(str(one["path"]), str(one["sha256"])) for one in content)
    except (TypeError, KeyError) as fault:
        raise ModelError(
            f"{file}: the list of adapters in it cannot be read ({fault!r}) -> copy or download it again"
        ) from fault


def read_series(folder: Path) -> Series:
    """The adapters that the one in `folder` was trained on; none if it names none. Raises `ModelError`."""
    file = folder / SERIES_FILE
    return _from_json(read_json(file).get("adapters"), file) if file.is_file() else ()


def merged_into(source: ModelSource) -> Series:
    """The adapters that an export merged into the model. Raises `ModelError`."""
    files = source.files
    folder = Path(files.name)
    if not files.is_local:
        from transformers.utils.hub import cached_file

        quietly = ("missing_entries", "connection_errors", "gated_repo")
        found = cached_file(
            files.name,
            MANIFEST_NAME,
            **source.access.options,
            **{f"_raise_exceptions_for_{kind}": False for kind in quietly},
        )
        if found is None:
            return ()
        folder = Path(found).parent
    try:
        content = read_manifest(folder)
    except OutputError:  # there is none, or it is another program's
        return ()
    return _from_json(content.get(MERGED, ()), folder / MANIFEST_NAME)


def given_as(key: str) -> Callable[[str], str]:
    """(adapters) -> the line of a run file that gives them."""
    return lambda paths: f"{key}: {paths}"


AS_ADAPTERS = given_as("adapter_name_or_path")


def adapters_of_reward_model(base: str) -> Callable[[str], str]:
    """The lines that give several to the reward model on `base`, where `reward_model` names one."""
    return lambda paths: f"reward_model_type: full, reward_model: {base} and reward_model_adapters: {paths}"


def check_series(
    names: Sequence[str],
    folders: Sequence[Path],
    source: ModelSource,
    line: Callable[[str], str] = AS_ADAPTERS,
) -> None:
    """Each adapter is put on what it was trained on. Raises `ModelError` if one is not.

    `source`: of the model. `line`: how a run file gives the right adapters.
    """
    for index, (name, folder) in enumerate(zip(names, folders, strict=True)):
        wanted = read_series(folder)
        if not wanted:
            continue
        merged = merged_into(source)
        here = (*merged, *beneath(names[:index], folders[:index]))
        if _hashes(here) != _hashes(wanted):
            own_names = {one.sha256: one.path for one in beneath(names, folders)}
            raise ModelError(
                f"{name}: this adapter was trained on top of {_listed(wanted)}, and here it is put on"
                f" {_listed(here) or 'the model alone'} -> {_remedy(name, wanted, merged, own_names, line)}"
            )


def _hashes(series: Series) -> list[str]:
    return [one.sha256 for one in series]


def _listed(series: Series) -> str:
    return ", ".join(one.path for one in series)


def _remedy(name: str, wanted: Series, merged: Series, own_names: dict[str, str], line: Callable[[str], str]) -> str:
    """`own_names`: hash -> name of the adapters that this run names, which may have been moved since."""
    fits = _hashes(wanted)[: len(merged)] == _hashes(merged)
    lacking = wanted[len(merged) :] if fits else wanted
    paths = ",".join([*(own_names.get(one.sha256, one.path) for one in lacking), name])
    model = "" if fits else "set model_name_or_path to the model that these were trained on, and "
    return f"{model}set {line(paths)}"


def note_beneath(adapted: "nn.Module", series: Series) -> "nn.Module":
    """The same model. `series`: what its adapter is trained on; saved beside it."""
    vars(adapted)[_RECORD] = series
    return adapted


def save_series(adapted: "nn.Module", folder: Path) -> None:
    """Beside an adapter that is trained on top of others: which."""
    if series := vars(adapted).get(_RECORD):
        content = json.dumps({"adapters": as_json(series)}, indent=2, ensure_ascii=False)
        (folder / SERIES_FILE).write_text(f"{content}\n", encoding="utf-8")


def check_resumed(adapted: "nn.Module", checkpoint: Path) -> None:
    """A checkpoint is resumed with what it was trained on. Raises `ModelError`."""
    wanted, here = read_series(checkpoint), vars(adapted).get(_RECORD, ())
    if wanted and _hashes(wanted) != _hashes(here):
        raise ModelError(
            f"{checkpoint}: its adapter was trained on top of {_listed(wanted)}, and here it is put on"
            f" {_listed(here) or 'the model alone'} -> name the model and the adapters as in the run that saved it"
        )
