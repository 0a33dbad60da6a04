"""The cache key of tokenized rows: a hash of data files, their description, tokenizer, chat format, keys and code."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.hubs import HubTokens
from luthier.core.files import write_atomically
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.sources.read import data_files, every_row

if TYPE_CHECKING:
    from luthier.data.chat.encoder import Encoder
    from luthier.data.rows.encoding import Encoding
    from luthier.data.sources.dataset_info import DatasetSpec
    from luthier.data.sources.readers import DataFile

CACHE_FORMAT = 2
"""To be raised when the meaning of the cached files changes."""
BIG_FILE_BYTES = 1 << 28
"""The hash of a file of at least this size is remembered."""
SETTLED_NANOSECONDS = 2 * 10**9
"""A file that changed more recently than this may change again without a new time stamp."""
ROW_CODE = (
    *("data/sources", "data/formats", "data/templates", "data/tools", "data/rows", "data/plans"),
    *(
        f"data/chat/{name}.py"
        for name in (
            *("__init__", "answers", "completeness", "continuation", "encoder", "model_template", "openai_messages"),
            *("parts", "program", "render", "repeats", "traits"),
        )
    ),
    *("data/packing", "data/media", "data/mix.py", "data/prepare.py", "data/training_keys.py", "data/types.py"),
)
"""The files and folders of the package that decide the ids, and no others: after a change of a loss, the doctor or the
eviction, cached rows are still valid."""
_PACKAGE = Path(__file__).parents[2]
_CHUNK_BYTES = 1 << 20
_SAMPLE_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"properties": {}}}}


def joint_key(*parts: Any) -> str | None:
    """One hash of values, by their `repr`; None if one of them is None, that is, unknown."""
    if any(part is None for part in parts):
        return None
    return hashlib.sha256(repr((CACHE_FORMAT, code_digest(), parts)).encode("utf-8", "surrogatepass")).hexdigest()


@lru_cache
def code_digest(parts: tuple[str, ...] = ROW_CODE) -> str:
    """A hash of the code that makes rows, so that no version of it reads the rows of another."""
    digest = hashlib.sha256()
    for path in code_files(parts):
        name = path.relative_to(_PACKAGE).as_posix()
        digest.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def code_files(parts: tuple[str, ...] = ROW_CODE) -> list[Path]:
    """The files named by `parts`, and those in the folders among them."""
    roots = [_PACKAGE / part for part in parts]
    assert all(root.exists() for root in roots), "the list follows the code when it moves"
    found = [path for root in roots for path in (root.rglob("*") if root.is_dir() else [root])]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def source_digest(spec: "DatasetSpec", folder: Path, *, cache_dir: str | None, tokens: HubTokens) -> tuple[str, ...]:
    """A hash of the description and of the data. The hashes of big files are remembered in `folder`.

    Hub repositories are hashed row by row, since each client has its own files on disk.
    """
    description = repr(replace(spec, file="", line=None))
    if spec.source.kind in ("file", "cloud"):
        return (description, *(f"{file.name} {file_digest(file, folder)}" for file in data_files(spec)))
    digest = hashlib.sha256()
    for row in every_row(spec, cache_dir, tokens):
        digest.update(repr(row.data).encode("utf-8", "surrogatepass"))
    return (description, digest.hexdigest())


def file_digest(file: "DataFile", folder: Path) -> str:
    """sha256 of the bytes. That of a big local file is remembered while the file is unchanged.

    Unchanged: same inode, size, modification time and status change time. No program can set back the last one; it must
    not be recent.
    """
    path = Path(file.name)
    if not path.is_file() or path.stat().st_size < BIG_FILE_BYTES:
        return _hashed(file)
    memo = folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"
    before = _state(path)
    remembered = _read_memo(memo)
    if remembered.get("state") == before:
        return str(remembered["sha256"])
    started, digest = time.time_ns(), _hashed(file)
    if _state(path) == before and started - path.stat().st_ctime_ns > SETTLED_NANOSECONDS:
        write_atomically(memo, json.dumps({"state": before, "sha256": digest}))
    return digest


def encoding_digest(encoding: "Encoding") -> tuple[Any, ...] | None:
    """Tokenizer, chat format and limits. None for a tokenizer that cannot be hashed."""
    tokenizer = tokenizer_digest(encoding.encoder)
    if tokenizer is None:
        return None
    parts: list[Any] = [tokenizer, encoding.template, encoding.cutoff_len]
    parts += [encoding.enable_thinking, encoding.preserve_thinking]
    if encoding.model_template is not None:
        chat_template = str(encoding.encoder.tokenizer.chat_template)
        parts += [chat_template, replace(encoding.model_template, encoder=None)]  # type: ignore[arg-type]
    if encoding.media is not None:
        parts += [encoding.media.processor.digest, sorted(encoding.media.slots.items())]
    return (*parts, date.today().isoformat() if is_dated(encoding) else "")


def is_dated(encoding: "Encoding") -> bool:
    """Whether the chat format writes the date, so that rows made another day differ."""
    if encoding.model_template is not None and "strftime_now" in str(encoding.encoder.tokenizer.chat_template):
        return True
    return _has_date(encoding.template.tool_syntax)


def tokenizer_digest(encoder: "Encoder") -> str | None:
    """A hash of the serialized tokenizer and its settings; None for one without a `tokenizers` backend."""
    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        return None
    encoder.reset()
    roles: Mapping[str, Any] = tokenizer.special_tokens_map
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    own = repr((sorted(roles.items()), ids, getattr(tokenizer, "add_bos_token", None), encoder.split_special_tokens))
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}{own}".encode()).hexdigest()


def _has_date(syntax: str) -> bool:
    """Whether the description of tools contains the date."""
    describe = TOOL_SYNTAXES.get(syntax).describe
    return bool(describe([_SAMPLE_TOOL], date(2020, 1, 1)) != describe([_SAMPLE_TOOL], date(2021, 2, 3)))


def _hashed(file: "DataFile") -> str:
    digest = hashlib.sha256()
    with file.open() as stream:
        while data := stream.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    known = path.stat()
    return [known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns]


def _read_memo(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
