"""Where a model comes from: a folder, a GGUF file (or a folder that holds just one), or a name on a hub.

Nothing here imports torch, so a wrong path is reported in a fraction of a second.
"""

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from luthier.core.errors import ModelError
from luthier.core.paths import absent_remedy
from luthier.core.versions import is_installed, missing_extra
from luthier.model.files.gguf.header import read_header
from luthier.model.files.hubs import NO_ACCESS, HubAccess, hub_access, local_name, not_fetched, resolution_fault

if TYPE_CHECKING:
    from luthier.config.keys.model import ModelConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The first that is there is read."""
QMODEL_FILE = "qmodel.pt"
"""What the library HQQ writes itself."""
TEKKEN_FILE = "tekken.json"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.py")
"""A tokenizer that comes as Python code may be made of anything."""
_WEIGHT_FILES = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _TORCH, f"{_TORCH}.index.json", QMODEL_FILE)


@dataclass(frozen=True)
class ModelSource:
    """A model as a user names it, and how its files are fetched. What was found out about the files is kept."""

    name: str
    """A folder, a GGUF file (or a folder that holds just one) or a name on a hub."""
    access: HubAccess = NO_ACCESS
    trust_remote_code: bool = False
    """Run the Python code in the repository of the model."""

    @cached_property
    def files(self) -> "ModelFiles":
        """Where the files are; what is on another hub than Hugging Face is fetched first. Raises `ModelError`."""
        return _locate(self.name, self.access)

    @cached_property
    def folder(self) -> Path:
        """The folder of the files. For a name on the hub it is in the cache, and holds config.json and what else was
        fetched. Raises `ModelError`."""
        return Path(self.files.name) if self.files.is_local else _fetch_config(self.files.name, self.access).parent

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises `ModelError`."""
        return read_json(self.folder / "config.json")

    @cached_property
    def has_weights_here(self) -> bool:
        """Whether all weights are on this disk. Those of a name on the hub may not have been fetched yet."""
        if self.files.gguf_file:
            return True
        try:
            return bool(weight_files(self.folder))
        except ModelError:
            return False

    @cached_property
    def headers(self) -> dict[str, dict[str, Any]]:
        """File name -> header of each weight file, {} for files of PyTorch. Raises `ModelError`."""
        return {
            str(file.relative_to(self.folder)): read_safetensors_header(file) if file.suffix == ".safetensors" else {}
            for file in weight_files(self.folder)
        }

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        return {**self.access.options, "trust_remote_code": self.trust_remote_code}


def model_source(keys: "ModelConfig") -> ModelSource:
    """The model that a run names."""
    return ModelSource(keys.model_name_or_path, hub_access(keys), keys.trust_remote_code)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the files of a model are."""

    name: str
    """A folder or a hub id."""
    gguf_file: str | None = None
    """The name of the GGUF file in that folder."""
    is_local: bool = True

    def __str__(self) -> str:
        return f"{self.name}/{self.gguf_file}" if self.gguf_file else self.name


@contextmanager
def permission_errors() -> Iterator[None]:
    """What may not be read becomes a `ModelError`. Decorates functions that look at the files of a model."""
    try:
        yield
    except PermissionError as fault:
        raise ModelError(
            f"{fault.filename}: cannot be read ({fault.strerror}) -> ask its owner for the right to read it, or copy it"
        ) from fault


@permission_errors()
def _locate(name_or_path: str, access: HubAccess) -> ModelFiles:
    """Raises `ModelError` for a name that is neither a folder, a GGUF file nor a hub id."""
    name_or_path = local_path(name_or_path, access)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path}: this file is not a model -> give the folder it is in, or a .gguf file")
        return ModelFiles(str(path.parent), path.name)
    if path.is_dir():
        return ModelFiles(str(path), None if (path / "config.json").is_file() else _only_gguf(path))
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name_or_path):
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        raise ModelError(
            f"{name_or_path}: there is no such model file or folder (it exists up to {parent})"
            f" -> {absent_remedy(name_or_path, 'correct the path')}"
        )
    return ModelFiles(name_or_path, is_local=False)


def _only_gguf(folder: Path) -> str:
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise ModelError(f"{folder}: it holds {len(files)} GGUF files -> name the one to load: {', '.join(files)}")
    if files:
        return files[0]
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: this is an adapter, not a model -> give it as adapter_name_or_path and its base model as "
            "model_name_or_path"
        )
    inner = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
    hint = f" -> did you mean its folder {inner[-1]}?" if inner else ""
    raise ModelError(f"{folder}: this folder holds no model: neither config.json nor a .gguf file{hint}")


@permission_errors()
def is_hub_id(name: str) -> bool:
    """Whether `name` can only be a repository of the hub."""
    return not Path(name).expanduser().exists() and _HUB_ID.fullmatch(name) is not None


@permission_errors()
def local_path(name: str, access: HubAccess) -> str:
    """`name`, or the folder it was fetched to if it is a name on another hub than Hugging Face. Raises `ModelError`."""
    return local_name(name, access) if is_hub_id(name) else name


@permission_errors()
def check_source(source: ModelSource, *, weights: bool = True) -> None:
    """Look at the files of a model without loading it.

    `weights=False` asks for the config alone (training from scratch).
    Raises `ModelError` for anything missing, half written or not a model, and for a hub id that cannot be fetched.
    """
    files = source.files
    if not files.is_local:
        check_hub(files.name, source.access)
        return
    if files.gguf_file:
        read_header(Path(files.name) / files.gguf_file)
        return
    _check_config(source)
    if weights:
        _check_weights(source)


def check_hub(name: str, access: HubAccess) -> None:
    """A name that is no folder is in the cache, or the hub can be reached. Raises `ModelError`.

    Runs first, since the hub's library tries again and again for half a minute before it gives up.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE

    if (Path(access.cache_dir or HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return
    host = urlsplit(ENDPOINT).hostname or ENDPOINT
    reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "" if getproxies() else resolution_fault(host)
    if reason:
        raise ModelError(
            f"{name}: there is no folder of this name here, and {host} cannot be asked for it ({reason}) -> give the "
            "path of a folder or a .gguf file, or check the name and the network"
        )


@permission_errors()
def check_tokenizer_files(folder: Path) -> None:
    """Something is there to make a tokenizer from, and what reads it. Raises `ModelError` and `MissingExtra`."""
    names = {path.name for path in folder.iterdir()}
    if not any(fnmatch(name, pattern) for name in names for pattern in _TOKENIZER_FILES):
        if TEKKEN_FILE in names:
            raise ModelError(
                f"{folder}: the tokenizer is there as {TEKKEN_FILE} alone, a format of mistral-common, which cannot be"
                " trained with here -> copy tokenizer.json and tokenizer_config.json from the model's repository for"
                " transformers into this folder"
            )
        raise ModelError(
            f"{folder}: the tokenizer is missing: there is no tokenizer.json, tokenizer.model or vocab.json"
            " -> copy the tokenizer's files of the model into this folder"
        )
    pieces = next((name for name in sorted(names) if fnmatch(name, "*.model")), None)
    if "tokenizer.json" not in names and pieces and not is_installed("sentencepiece"):
        raise missing_extra("sentencepiece", "sentencepiece", f"{folder / pieces}")


@permission_errors()
def check_adapter_source(name_or_path: str, folder: str | None = None, access: HubAccess = NO_ACCESS) -> None:
    """The same for an adapter: its config and weights are there and whole. `folder` is `adapter_folder`."""
    path = Path(name_or_path).expanduser()
    path = path / folder if folder else path
    if not path.is_dir():
        if not Path(name_or_path).expanduser().is_dir() and _HUB_ID.fullmatch(name_or_path):
            check_hub(name_or_path, access)
            return
        raise ModelError(f"{path}: there is no such adapter folder -> {absent_remedy(str(path), 'correct the path')}")
    config = path / "adapter_config.json"
    if not config.is_file():
        checkpoints = sorted(child.name for child in path.iterdir() if (child / "adapter_config.json").is_file())
        hint = f" -> did you mean its folder {checkpoints[-1]}?" if checkpoints else ""
        if (path / "config.json").is_file():
            hint = " -> it holds a whole model: name it as the model, without an adapter"
        raise ModelError(f"{path}: this folder holds no adapter: adapter_config.json is missing{hint}")
    if "peft_type" not in read_json(config):
        raise ModelError(f"{config}: this names no peft_type, so it is not the config of an adapter")
    weights, former = (path / name for name in ADAPTER_WEIGHTS)
    if weights.is_file():
        read_safetensors_header(weights)
    elif not former.is_file():
        raise ModelError(f"{path}: the adapter's weights are missing: neither adapter_model.safetensors nor .bin")


@permission_errors()
def read_json(path: Path) -> dict:
    """A JSON object of a model's files. Raises `ModelError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise ModelError(f"{path}: this is not valid JSON ({fault}) -> copy or download it again") from fault
    if not isinstance(content, dict):
        raise ModelError(f"{path}: this should hold a JSON object, not a {type(content).__name__}")
    return content


def _fetch_config(name: str, access: HubAccess) -> Path:
    """config.json of a repository of the hub, in the cache. Raises `ModelError`."""
    from huggingface_hub import errors, hf_hub_download

    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: "its owner gives access on request, and this token has none",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private",
        errors.RevisionNotFoundError: f"it has no revision {access.revision}",
        errors.LocalEntryNotFoundError: "the hub does not answer, and the cache has none",
        errors.EntryNotFoundError: "it has no config.json",
    }
    check_hub(name, access)
    try:
        return Path(hf_hub_download(name, "config.json", **access.options))
    except (OSError, ValueError) as fault:
        first = next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
        reason = next((words for kind, words in reasons.items() if isinstance(fault, kind)), first)
        raise not_fetched(name, "config", reason) from fault


def _check_config(source: ModelSource) -> None:
    path, config = Path(source.files.name) / "config.json", source.config
    if "model_type" not in config and "architectures" not in config:
        raise ModelError(f"{path}: this config names no model_type, so it is not the config of a language model")
    check_architectures(path, config.get("architectures"))


def check_architectures(path: Path | str, named: Any) -> None:
    """Raises `ModelError` if `named`, the entry of the config at `path`, is not a list of names."""
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ModelError(
            f"{path}: architectures: {named!r}: must be a list of class names, such as [LlamaForCausalLM]"
            " -> correct it, or copy or download the file again"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, all of them there. Raises `ModelError`."""
    present = [name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise ModelError(
            f"{folder}: the weights are missing: none of {', '.join(_WEIGHT_FILES)} is there -> copy the whole folder, "
            "or set train_from_scratch: true to start from random weights"
        )
    if not present[0].endswith(".index.json"):
        return [folder / present[0]]
    shards = sorted(set(_weight_map(folder / present[0]).values()))
    outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts or "\0" in shard]
    if outside:
        raise ModelError(f"{folder / present[0]}: it names {outside[0]!r}, which is not in this folder -> correct it")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:3])} -> copy "
            "or download them again"
        )
    return [folder / shard for shard in shards]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file."""
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(file, str) for file in content.values()):
        raise ModelError(f"{index}: this index has no weight_map -> copy or download it again")
    return content


def _check_weights(source: ModelSource) -> None:
    folder, headers = Path(source.files.name), source.headers
    if QMODEL_FILE in headers and not is_zipfile(folder / QMODEL_FILE):
        raise ModelError(f"{folder / QMODEL_FILE}: this file is cut off or damaged -> copy or download it again")
    index = folder / f"{_SAFETENSORS}.index.json"
    if not index.is_file() or (folder / _SAFETENSORS).is_file():
        return
    lost = [name for name, file in _weight_map(index).items() if name not in headers[str(Path(file))]]
    if lost:
        raise ModelError(
            f"{index}: it names {len(lost)} tensors that are not in their files, such as {lost[0]} in "
            f"{_weight_map(index)[lost[0]]} -> the files do not belong together; copy or download all of them again"
        )


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Tensor name -> dtype, shape and byte range; `__metadata__` -> texts. Raises `ModelError` for a file cut short.

    Layout: u64 length of the header, the header as JSON with the byte range of each tensor, the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors = json.loads(header)
        end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as fault:
        raise ModelError(
            f"{path}: this is not a whole safetensors file (its header cannot be read) -> copy or download it again"
        ) from fault
    if 8 + length + end != size:
        raise ModelError(
            f"{path}: this file is cut off or damaged: {size:,} bytes instead of {8 + length + end:,} -> copy or "
            "download it again"
        )
    return tensors
