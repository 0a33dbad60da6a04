"""The processor of a multimodal model: loaded with the limits of a run, and saved together with the weights.

Without limits its files are copied unchanged. With limits the saved files contain them. `AutoProcessor` loads them
together with the tokenizer.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.processor import given_limits
from luthier.core.errors import ModelError, Problem
from luthier.core.log import info, quiet, warn
from luthier.core.versions import is_installed, missing_extra
from luthier.model.files.hubs import NO_ACCESS, HubAccess, fetched
from luthier.model.files.readable import readable
from luthier.model.files.sources import ModelFiles, ModelSource, is_hub_id, local_path, model_source, read_json
from luthier.model.media.limits import parts_of, set_limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from luthier.config.keys.model import ModelConfig
    from luthier.config.runs import ExportRun, Run, TrainRun

_WHOLE, _PICTURES, _FILMS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR_FILES = (_WHOLE, _PICTURES, _FILMS)
"""The whole as transformers 5 writes it, and its parts as earlier versions do (that of audio under the second name)."""
_LIBRARIES = {"torchvision": ("torchvision", r"\btorchvision\b"), "pillow": ("PIL", r"\b(pil|pillow)\b")}
"""Library -> its module, and how transformers calls it where it lacks it."""
_SENSES = re.compile("vision|visual|audio|speech|image|video")
_TEXT_ONLY = "has no effect: this model reads text only"


@dataclass(frozen=True, slots=True)
class FittedProcessor:
    """What is saved with the weights of a run."""

    files: tuple[Path, ...] | None = None
    """Of the adapter that has brought them, or of the model; None for those of the checkpoint as it is, if any."""
    access: HubAccess = NO_ACCESS
    """How the files of the checkpoint are fetched."""
    processor: Any = None
    """The `ProcessorMixin` with the limits set; None if there are none to set."""
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a part -> attribute -> value that the run gave it."""


AS_IT_IS = FittedProcessor()
"""That of the checkpoint, from a public repository or a folder."""


def load_processor(
    source: ModelSource, limits: Mapping[str, Any]
) -> "tuple[ProcessorMixin, Mapping[str, Mapping[str, Any]]]":
    """The processor of a folder or hub id with `limits` (key of a run -> value) set on its parts, and what was set:
    name of a part -> attribute -> value.

    A warning names each key that nothing in it reads. Raises `ModelError` where it cannot be loaded or a limit
    contradicts it, and `MissingExtra` without a library that it needs.
    """
    from transformers import AutoProcessor

    folder = Path(source.name).expanduser()  # a model's or an adapter's
    has_own_files = any((folder / name).is_file() for name in PROCESSOR_FILES)
    files = ModelFiles(str(folder)) if has_own_files else source.files
    with readable(files, "processor"), quiet("transformers"), _libraries_available(files.name):
        processor = AutoProcessor.from_pretrained(files.name, **source.options)
    kind = type(processor).__name__
    outcome = set_limits(processor, limits)
    for key, value in limits.items():
        if key not in outcome.read and value is not False:
            warn(f"{key}: has no effect: nothing in the processor of this model ({kind}) reads it")
        if key in outcome.unsaved:
            warn(
                f"{key}: {kind} of transformers sets it again with each call, whatever its files say -> a program that"
                " loads the saved model has to give it with the call"
            )
    for note in outcome.notes:
        info(note)
    return processor, outcome.changes


def processor_class(source: ModelSource) -> str | None:
    """The class that the files of a processor name, which are read without the libraries that it needs."""
    for file in _find(source.name, source.access):
        name = read_json(file).get("processor_class") if file.suffix == ".json" else None
        if isinstance(name, str):
            return name
    return None


@contextmanager
def _libraries_available(name: str) -> Iterator[None]:
    """Around loading: a library that transformers misses becomes `MissingExtra`."""
    try:
        yield
    except (ImportError, ValueError) as fault:
        for library, (module, words) in _LIBRARIES.items():
            if re.search(words, str(fault), re.IGNORECASE) and not is_installed(module):
                raise missing_extra(library, "vision", f"{name}: its processor") from fault
        raise


def fit_processor(run: "TrainRun | ExportRun", source: ModelSource | None = None) -> FittedProcessor:
    """The processor that is saved with the weights of `run`.

    `source`: of the model, if it is located already. Raises as `load_processor`.
    """
    keys, limits = run.model, given_limits(run)
    source = _source(keys, source or model_source(keys))
    if not limits and source.name == keys.model_name_or_path:
        return FittedProcessor(access=source.access)
    files = _find(source.name, source.access)
    if not limits:
        return FittedProcessor(files, source.access)
    if not files:
        told = {warning.key for warning in run.warnings}
        for key in limits:
            if key in run.changed and key not in told:
                warn(f"{key}: {_TEXT_ONLY}, or its folder lacks the files of its processor")
        return FittedProcessor(access=source.access)
    loaded = load_processor(source, limits)
    return FittedProcessor(files, source.access, *loaded)


def _source(keys: "ModelConfig", source: ModelSource) -> ModelSource:
    """The last adapter, if a run with limits has saved a processor beside it; else the model."""
    if keys.adapter_name_or_path:
        last = local_path(keys.adapter_name_or_path[-1], source.access)
        folder = Path(last, keys.adapter_folder or "").expanduser()
        if any((folder / name).is_file() for name in PROCESSOR_FILES):
            return replace(source, name=str(folder))
    return source


def text_only_problems(run: "Run") -> Iterator[Problem]:
    """Limits of images, videos and audio given to a local model that is known to read text only."""
    name = run.model.model_name_or_path
    changed = [key for key in given_limits(run) if key in run.changed]
    if changed and name and not is_hub_id(name) and reads_text_only(ModelSource(name)):
        for key in changed:
            yield Problem(key, _TEXT_ONLY, "leave it out, or take a multimodal model")


def reads_text_only(source: ModelSource) -> bool:
    """Whether a model has neither a processor nor a config of an encoder of images or audio, or is a GGUF file.

    False where that cannot be known: it comes with its own code, or is not there.
    """
    try:
        if source.files.gguf_file:
            return True
        config = source.config
    except ModelError:  # reported where the model is checked
        return False
    return "auto_map" not in config and not _has_senses(config) and not _find(source.files.name, source.access)


def _has_senses(config: Mapping[str, Any]) -> bool:
    parts = {name: part for name, part in config.items() if isinstance(part, dict)}
    return any(_SENSES.search(name) or _has_senses(part) for name, part in parts.items())


def copy_processor(model: "PreTrainedModel", folder: Path, fitted: FittedProcessor = AS_IT_IS) -> None:
    """Put the processor of `fitted`, or else of the checkpoint that `model` was loaded from, into `folder`.

    Without files of its own, nothing is copied for a config without parts, which is that of a text model.
    """
    source = model.config._name_or_path
    if fitted.files is None and not (model.config.sub_configs and source):
        return
    files = fitted.files if fitted.files is not None else _find(source, fitted.access)
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    if not files:
        _say_missing(source)
    if fitted.changes:
        _write_changes(fitted, folder)


def _write_changes(fitted: FittedProcessor, folder: Path) -> None:
    """The whole in the layout of transformers 5, and the limits in the files of earlier versions that lie there.

    Where these have one file for images and videos, the latter get their own, as the limits of the two differ.
    """
    fitted.processor.to_json_file(folder / _WHOLE)
    for name, sense, part in parts_of(fitted.processor):
        file = folder / (_FILMS if sense == "video" else _PICTURES)
        if file.is_file():
            _change_file(file, fitted.changes.get(name, {}))
        elif sense == "video" and (folder / _PICTURES).is_file():
            part.to_json_file(file)


def _change_file(file: Path, values: Mapping[str, Any]) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    size = values.get("size", {})
    # The names of these before they were in `size`; they take precedence over it.
    for former, ends in (
        ("min_pixels", ("min_pixels", "shortest_edge")),
        ("max_pixels", ("max_pixels", "longest_edge")),
    ):
        area = next((size[end] for end in ends if end in size), None)
        if former in content and area is not None:
            content[former] = area
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@cache
def _say_missing(source: str) -> None:
    warn(f"{source} has no files of a processor, so none are saved with the weights, and images cannot be read")


def _find(source: str, access: HubAccess) -> tuple[Path, ...]:
    """The files of a processor that a folder or a repository of the hub has, with the code that they name."""
    path = Path(fetched(source)).expanduser()
    if path.is_dir():
        files = tuple(path / name for name in PROCESSOR_FILES if (path / name).is_file())
        return (*files, *(sorted(path.glob("*.py")) if _code_of(files) else ()))
    files = _on_the_hub(source, PROCESSOR_FILES, access)
    return (*files, *_on_the_hub(source, _code_of(files), access))


def _code_of(files: Iterable[Path]) -> list[str]:
    """The Python files of the processor that its configs name: `{"auto_map": {"AutoProcessor": "file.Class"}}`."""
    maps = (read_json(file).get("auto_map") for file in files)
    names = {
        name
        for one in maps
        if isinstance(one, dict)
        for name in one.values()
        if isinstance(name, str) and "--" not in name
    }
    return sorted({f"{name.partition('.')[0]}.py" for name in names})


def _on_the_hub(source: str, names: Iterable[str], access: HubAccess) -> tuple[Path, ...]:
    """Those of the files that a repository has."""
    from transformers.utils.hub import cached_file

    found = (
        cached_file(
            source,
            name,
            **access.options,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in names
    )
    return tuple(Path(file) for file in found if file)
