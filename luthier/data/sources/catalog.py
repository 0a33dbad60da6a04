"""The datasets that a run can use: dataset_info.json, parsed strictly, and the checks of `luthier check`.

Nothing heavy is imported, and only the first rows of the data are read. Problems of the entries that a run uses are
errors; problems of other entries in the same file are warnings.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, Problem
from luthier.core.kinds import STAGES
from luthier.core.paths import absent_remedy
from luthier.core.registry import did_you_mean
from luthier.data.media.items import declared_kinds
from luthier.data.media.kinds import media_kinds
from luthier.data.sources.columns import check_columns
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source, Tags, parse_description
from luthier.data.sources.located_json import LocatedJson, read_located
from luthier.data.types import Feedback, Preference

if TYPE_CHECKING:
    from luthier.config.keys.data import DataConfig

__all__ = ["Catalog", "Columns", "DatasetSpec", "Source", "Tags", "check_datasets", "declared_media", "load_catalog"]

CATALOG_FILE = "dataset_info.json"
MOST_OFFERED = 20
"""Names in a message about a dataset that is not described."""
MOST_UNUSED = 5
"""Names of wrongly described datasets that a run does not use."""
OTHER_COMMAS = "，、；;"
"""What people write between names instead of a comma."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """All descriptions of one dataset_info.json. An invalid one raises only when `get` is called for it."""

    file: str
    specs: Mapping[str, DatasetSpec]
    errors: Mapping[str, tuple[Problem, ...]]
    warnings: Mapping[str, tuple[Problem, ...]]
    is_online: bool = False
    """Every name is a hub repository with the alpaca defaults (`dataset_dir: ONLINE`)."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple({**self.specs, **self.errors})

    def get(self, name: str) -> DatasetSpec:
        """Raises `DataError` for a name without a description, or with an invalid one."""
        if self.is_online:
            return DatasetSpec(name=name, source=Source("hf_hub", name))
        if self.errors.get(name):
            raise DataError("\n  ".join([f"dataset {name!r} has an invalid description", *map(str, self.errors[name])]))
        if name not in self.specs:
            reason, remedy = self.unknown(name)
            raise DataError(f"dataset {name!r}: {reason} -> {remedy}")
        return self.specs[name]

    def unknown(self, name: str) -> tuple[str, str]:
        """(reason, remedy) for a name without a description."""
        remedy = did_you_mean(name, self.names, repr) or f"one of {_listed(self.names, MOST_OFFERED)}"
        if os.path.isfile(name):
            entry = json.dumps({"file_name": os.path.abspath(name)}, ensure_ascii=False)
            remedy = f'add "my_data": {entry} to it, and name my_data here'
        mark = next((mark for mark in OTHER_COMMAS if mark in name), None)
        if mark is not None:
            remedy = f"write a comma (,) between two names, not {mark!r}"
        return f"is not described in {self.file}", remedy


def load_catalog(
    dataset_dir: str | Mapping[str, Any],
    media_dir: str | None = None,
    *,
    hf_hub_token: str | None = None,
    cache_dir: str | None = None,
) -> Catalog:
    """The catalog of a folder, of `ONLINE`, of `REMOTE:<hub repository>`, or of a dict of descriptions (Python only).

    `media_dir` defaults to the folder; files named in a dict are relative to the working directory. What is fetched
    from the hub is kept in `cache_dir`. Raises `DataError` if there is no catalog or it is not a JSON object; an
    invalid entry is kept with its problems.
    """
    if isinstance(dataset_dir, Mapping):
        return _catalog("dataset_dir", LocatedJson(dataset_dir), root="", media_dir=media_dir or "")
    if dataset_dir == "ONLINE":
        return Catalog("ONLINE", {}, {}, {}, is_online=True)
    if dataset_dir.startswith("REMOTE:"):
        repository = dataset_dir.removeprefix("REMOTE:")
        path, root = _remote_catalog(repository, hf_hub_token, cache_dir), f"hf://datasets/{repository}"
        return _catalog(path, _located(path), root=root, media_dir=media_dir or "")
    path = os.path.join(dataset_dir, CATALOG_FILE)
    if not os.path.isfile(path):
        if os.path.isfile(dataset_dir):
            raise DataError(f"dataset_dir {dataset_dir!r} is a file -> give the folder that holds {CATALOG_FILE}")
        why = f"holds no {CATALOG_FILE}" if os.path.isdir(dataset_dir) else "does not exist"
        remedy = (
            f"give the folder that holds {CATALOG_FILE}, relative to the working directory ({os.getcwd()}) or absolute"
        )
        raise DataError(f"dataset_dir {dataset_dir!r} {why} -> {absent_remedy(dataset_dir, remedy)}")
    return _catalog(path, _located(path), root=dataset_dir, media_dir=media_dir or dataset_dir)


def _remote_catalog(repository: str, token: str | None, cache_dir: str | None) -> str:
    from huggingface_hub import hf_hub_download

    from luthier.data.sources.readers.remote import first_line

    try:
        return hf_hub_download(repository, CATALOG_FILE, repo_type="dataset", token=token, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise DataError(
            f"dataset_dir: {CATALOG_FILE} of the hub repository {repository!r} cannot be fetched ({first_line(error)}) "
            f"-> check the name, the network and the token, or download the repository and give its folder"
        ) from error


def _located(path: str) -> LocatedJson:
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        located = read_located(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read: {error}") from error
    if not isinstance(located.value, dict):
        raise DataError(f"{path}: must be an object of dataset names and their descriptions")
    return located


def _catalog(file: str, located: LocatedJson, *, root: str, media_dir: str) -> Catalog:
    specs: dict[str, DatasetSpec] = {}
    errors: dict[str, tuple[Problem, ...]] = {}
    warnings: dict[str, tuple[Problem, ...]] = {}
    for path, line in located.repeated:
        problem = Problem(".".join(path), "appears twice", "remove one of the two", file=file, line=line)
        errors[path[0]] = (*errors.get(path[0], ()), problem)
    for name, entry in located.value.items():
        spec, faults, notes = parse_description(
            name, entry, root=root, media_dir=media_dir, file=file, lines=located.lines
        )
        if faults:
            errors[name] = (*errors.get(name, ()), *faults)
        elif spec is not None and name not in errors:
            specs[name] = spec
        if notes:
            warnings[name] = notes
    return Catalog(file, specs, errors, warnings)


def check_datasets(
    data: "DataConfig", stage: str | None, *, others: bool = True
) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings) about the datasets of a run, found without a network and without reading whole files.

    Checked are names, descriptions, files, the columns of the first rows, and, unless the stage is None (not known),
    whether it takes this kind of data. `others`: also warn about invalid descriptions of datasets that the run does not
    use.
    """
    reads_loss = stage is None or STAGES.get(stage).rows.weigh is not None
    uses = [*(("dataset", name) for name in data.dataset), *(("eval_dataset", name) for name in data.eval_dataset)]
    is_remote = isinstance(data.dataset_dir, str) and data.dataset_dir.startswith("REMOTE:")
    if not uses or is_remote:
        return [], []
    try:
        catalog = load_catalog(data.dataset_dir, data.media_dir)
    except DataError as error:
        return [Problem("dataset_dir", str(error).removeprefix(f"dataset_dir {data.dataset_dir!r} "))], []
    errors = [*_media_dir_faults(data)]
    warnings: list[Problem] = []
    checked = set()
    for key, name in uses:
        if catalog.is_online or name in checked:
            continue
        checked.add(name)
        if name not in catalog.names:
            reason, remedy = catalog.unknown(name)
            errors.append(Problem(key, reason, remedy, value=name, has_value=True))
            continue
        errors += catalog.errors.get(name, ())
        warnings += catalog.warnings.get(name, ())
        if name in catalog.specs:
            found, notes = check_columns(catalog.specs[name], reads_loss=reads_loss)
            errors += [*(_stage_faults(catalog.specs[name], stage) if stage is not None else ()), *found]
            errors += _media_faults(catalog.specs[name], data, stage)
            warnings += notes
    if others:
        warnings += _faults_elsewhere(catalog, checked)
    return errors, warnings


def _faults_elsewhere(catalog: Catalog, used: set[str]) -> Iterator[Problem]:
    """A fault in a description that the run does not use. Of several, one line names the datasets."""
    wrong = [name for name in catalog.names if name not in used and catalog.errors.get(name)]
    faults = [fault for name in wrong for fault in catalog.errors[name]]
    if len(faults) <= 1:
        yield from faults
        return
    names = _listed(wrong, MOST_UNUSED)
    remedy = f"`luthier check RUN dataset={wrong[0]}` says what is wrong with it"
    yield Problem(names, "not described as they must be; this run does not use them", remedy, file=catalog.file)


def _listed(names: Sequence[str], most: int) -> str:
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others} other{'s' * (others > 1)}" if others > 0 else "")


def _media_dir_faults(data: "DataConfig") -> Iterator[Problem]:
    folder = data.media_dir
    if folder is not None and not os.path.isdir(folder):
        reason = "is a file, not a folder" if os.path.exists(folder) else "is not there"
        remedy = absent_remedy(folder, "name the folder that the paths of images, videos and audio start from")
        yield Problem("media_dir", reason, remedy, value=folder, has_value=True)


def _media_faults(spec: DatasetSpec, data: "DataConfig", stage: str | None) -> Iterator[Problem]:
    """What keeps a run from using a dataset with media."""
    for kind in declared_kinds(spec):
        key = f"{spec.name}.columns.{kind.column}"
        if stage is not None and not STAGES.get(stage).rows.reads_chat:
            reason = f"stage {stage} learns plain text without {kind.plural}"
            yield Problem(key, reason, "use stage: sft, or leave the column out", file=spec.file, line=spec.line)
        if data.on_overlong == "split":
            reason = f"on_overlong: split would cut rows apart from their {kind.plural}"
            yield Problem(key, reason, "set on_overlong: truncate or drop", file=spec.file, line=spec.line)


def declared_media(
    data: "DataConfig", *, hf_hub_token: str | None = None, cache_dir: str | None = None
) -> tuple[str, ...]:
    """The kinds of media that the datasets of a run have columns for. None of datasets that cannot be found."""
    try:
        catalog = load_catalog(data.dataset_dir, data.media_dir, hf_hub_token=hf_hub_token, cache_dir=cache_dir)
        specs = [catalog.get(name) for name in (*data.dataset, *data.eval_dataset)]
    except DataError:  # reported when the data are read
        return ()
    found = {kind.name for spec in specs for kind in declared_kinds(spec)}
    return tuple(kind.name for kind in media_kinds() if kind.name in found)


def _stage_faults(spec: DatasetSpec, stage: str) -> Iterator[Problem]:
    """What keeps a stage from using a dataset, by the kind of example that its rows are."""

    def fault(reason: str, remedy: str) -> Problem:
        return Problem(spec.name, reason, remedy, file=spec.file, line=spec.line)

    takes = STAGES.get(stage).rows.examples
    if spec.ranking and Preference not in takes:
        yield fault(f"is ranking data, which stage {stage} cannot use", f"use it in {_stages_that_take(Preference)}")
    if not spec.ranking and Preference in takes:
        remedy = 'describe it with "ranking": true and the columns chosen and rejected'
        yield fault(f"is not ranking data, which stage {stage} needs", remedy)
    if spec.columns.kto_tag and Feedback not in takes:
        remedy = f"use it in {_stages_that_take(Feedback)}, or describe it without `kto_tag`"
        yield fault(f"has a `kto_tag` column, which stage {stage} cannot use", remedy)
    if not spec.columns.kto_tag and Feedback in takes:
        remedy = 'name the column of likes with "kto_tag" in `columns`'
        yield fault(f"has no `kto_tag` column, which stage {stage} needs", remedy)


def _stages_that_take(example: type) -> str:
    return " or ".join(name for name in STAGES.names if example in STAGES.get(name).rows.examples)
