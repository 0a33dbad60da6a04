"""One entry of dataset_info.json: where the rows are, their format, and the names of their columns and roles.

Field names are the keys of the file. As in LLaMA-Factory, a `columns` (or `tags`) object replaces all defaults: what it
does not list is absent. `luthier.data.sources.catalog` reports columns that get lost this way.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from luthier.config.keys.hubs import HUBS
from luthier.config.sections import is_on
from luthier.core.errors import Problem
from luthier.core.kinds import FORMATS
from luthier.core.registry import did_you_mean
from luthier.data.sources.readers.saved import holds_splits

MEDIA_COLUMNS = ("images", "videos", "audios")

SourceKind = Literal["file", "cloud", "hf_hub", "ms_hub", "om_hub"]


@dataclass(frozen=True, slots=True)
class Source:
    """The source of rows: a path, the address of a cloud object, or the name of a hub repository."""

    kind: SourceKind
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The name of each column in the data; None if the data have none."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None

    @property
    def media(self) -> tuple[str, ...]:
        """The names of the media columns in the data."""
        return tuple(name for name in (self.images, self.videos, self.audios) if name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """The names of keys and roles of messages in the data; None if the data have none."""

    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A valid description. `subset`, `split` and `folder` select a part of a hub repository."""

    name: str
    source: Source
    formatting: str = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Columns = Columns()
    tags: Tags = Tags()
    columns_given: bool = False
    tags_given: bool = False
    media_dir: str = ""
    """Folder that relative paths in the media columns start from."""
    file: str = ""
    line: int | None = None
    """The position of the description."""

    @property
    def column_names(self) -> frozenset[str]:
        """The columns of the data that a format may read. Tables have others, which cost time and may hold anything."""
        named = [getattr(self.columns, f.name) for f in fields(Columns)]
        return frozenset([*filter(None, named), *(() if self.columns_given else ("messages", "tools"))])


_TYPES: Mapping[str, type] = {
    "hf_hub_url": str,
    "ms_hub_url": str,
    "om_hub_url": str,
    "script_url": str,
    "cloud_file_name": str,
    "file_name": str,
    "formatting": str,
    "ranking": bool,
    "subset": str,
    "split": str,
    "folder": str,
    "num_samples": int,
    "columns": dict,
    "tags": dict,
}
_TYPE_WORDS = {str: "text", bool: "true or false", int: "a whole number", dict: "an object"}
_NO_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(
        ("file_sha1", "dataset_sha1", "file_sha256", "file_md5"), "the rows are read without comparing hashes"
    ),
    **dict.fromkeys(("description", "homepage", "citation", "license", "version"), "it only tells about the data"),
    **dict.fromkeys(("comment", "comments", "note", "notes"), "it is a comment"),
}
"""Key that older description files and the cards of hub repositories hold -> why it changes nothing."""
_COMMENT_MARKS = ("_", "#", "//", "$")
"""A key that begins with one of these is a comment, as JSON has no others."""
_CLOUDS = ("s3://", "gs://", "gcs://", "hf://")

Fault = tuple[tuple[str, ...], str, str]
"""Path of keys below the dataset's name, reason, remedy."""


def parse_description(
    name: str, entry: Any, *, root: str, media_dir: str, file: str, lines: Mapping[tuple[str, ...], int]
) -> tuple[DatasetSpec | None, tuple[Problem, ...], tuple[Problem, ...]]:
    """(spec or None, errors, warnings) of one entry. `root`: folder or hub address that file names start from."""

    def located(fault: Fault) -> Problem:
        path, reason, remedy = fault
        line = lines.get((name, *path), lines.get((name,)))
        value = _value_at(entry, path)
        return Problem(
            ".".join((name, *path)),
            reason,
            remedy,
            value=value,
            has_value=bool(path) and not isinstance(value, Mapping),
            file=file,
            line=line,
        )

    if not isinstance(entry, Mapping):
        return None, (located(((), "the description of a dataset is an object", "")),), ()
    errors = [*_type_faults(entry)]
    if not errors:
        errors = [*_source_faults(entry, root), *_column_faults(entry)]
    warnings = [] if errors else [*_unread_keys(entry)]
    if errors:
        return None, tuple(map(located, errors)), ()
    columns, tags = entry.get("columns"), entry.get("tags")
    given = {key: entry[key] for key in ("formatting", "ranking", "subset", "split", "folder", "num_samples")
             if entry.get(key) is not None}  # fmt: skip
    spec = DatasetSpec(
        name=name,
        source=_source(entry, root),
        columns=Columns() if columns is None else Columns(**{f.name: columns.get(f.name) for f in fields(Columns)}),
        tags=Tags() if tags is None else Tags(**{f.name: tags.get(f.name) for f in fields(Tags)}),
        columns_given=columns is not None,
        tags_given=tags is not None,
        media_dir=media_dir,
        file=file,
        line=lines.get((name,)),
        **given,
    )
    return spec, (), tuple(map(located, warnings))


def _value_at(entry: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry


def _type_faults(entry: Mapping[str, Any]) -> Iterator[Fault]:
    for key, value in entry.items():
        wanted = _TYPES.get(key)
        if _no_effect(key):
            continue
        if wanted is None:
            yield (key,), "unknown key of a dataset description", _did_you_mean(key, _TYPES)
        elif value is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            yield (key,), f"must be {_TYPE_WORDS[wanted]}", ""
        elif isinstance(value, int) and wanted is int and value < 1:
            yield (key,), "must be at least 1", ""
    for group, known in (("columns", Columns), ("tags", Tags)):
        members = entry.get(group)
        names = [f.name for f in fields(known)]
        for key, value in members.items() if isinstance(members, Mapping) else ():
            if _is_comment(key):
                continue
            if key not in names:
                yield (group, key), f"unknown key of {group!r}", _did_you_mean(key, names)
            elif not isinstance(value, str | None):
                yield (group, key), "must be text (a name that the data use)", ""


def _is_comment(key: str) -> bool:
    return key.startswith(_COMMENT_MARKS)


def _no_effect(key: str) -> str:
    """Why a key of a description is accepted and changes nothing; empty for all others."""
    return _NO_EFFECT["comment"] if _is_comment(key) else _NO_EFFECT.get(key, "")


def _did_you_mean(name: str, known: Any) -> str:
    return did_you_mean(name, known, repr) or f"one of {', '.join(known)}"


def _source_faults(entry: Mapping[str, Any], root: str) -> Iterator[Fault]:
    hub = any(entry.get(key) for key in ("hf_hub_url", "ms_hub_url", "om_hub_url"))
    cloud, file_name = entry.get("cloud_file_name"), entry.get("file_name")
    if hub:
        return
    if entry.get("script_url"):
        reason = "dataset scripts cannot be run: the library `datasets` has refused to run them since version 4"
        yield ("script_url",), reason, "convert the data to json, jsonl, csv or parquet and give `file_name`"
    elif cloud and not cloud.startswith(_CLOUDS):
        yield ("cloud_file_name",), "must start with s3://, gs:// or gcs://", "local files go to `file_name`"
    elif not cloud and not file_name:
        yield (), "does not say where the rows are", "give `file_name`, `cloud_file_name` or `hf_hub_url`"
    elif file_name and not cloud and entry.get("split") not in (None, "train"):
        if holds_splits(_local_path(root, file_name)):
            return
        reason = "a local file has the split 'train' only"
        yield ("split",), reason, "give each part its own file, or use `num_samples` or `max_samples`"


def _column_faults(entry: Mapping[str, Any]) -> Iterator[Fault]:
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in FORMATS.names:
        yield ("formatting",), "unknown formatting", _did_you_mean(formatting, FORMATS.names)
        return
    columns, tags = entry.get("columns"), entry.get("tags")
    named = columns or {}
    if entry.get("ranking"):
        for key in ("chosen", "rejected"):
            if not named.get(key):
                reason = f"ranking data need a column for {key!r}"
                yield ("columns",) if columns else (), reason, f'add "{key}": "<its name in the data>" to `columns`'
        if named.get("kto_tag"):
            yield ("columns", "kto_tag"), "excludes `ranking`", "a dataset is either ranked pairs or single ratings"
    elif named.get("kto_tag") and formatting == "alpaca" and not named.get("response"):
        yield ("columns",), "names a `kto_tag` but no `response` that it rates", 'add "response"'
    has_conversation = named.get("messages") or entry.get("ranking")  # whole conversations may be the answers
    if columns is not None and FORMATS.get(formatting).has_roles and not has_conversation:
        yield ("columns",), "names no `messages` column, and giving `columns` clears the defaults", 'add "messages"'
    if columns is not None and formatting == "alpaca" and not (named.get("prompt") or named.get("query")):
        yield ("columns",), "names no `prompt` column, and giving `columns` clears the defaults", 'add "prompt"'
    if tags is not None and FORMATS.get(formatting).has_roles:
        for key in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
            if not tags.get(key):
                reason = f"names no `{key}`, and giving `tags` clears the defaults"
                yield ("tags",), reason, f'add "{key}"'


def _unread_keys(entry: Mapping[str, Any]) -> Iterator[Fault]:
    """Keys that are accepted and not read for this description."""
    formatting = entry.get("formatting") or "alpaca"
    reader = _winning_key(entry)
    for key in entry:
        if why := _no_effect(key):
            yield (key,), f"has no effect: {why}", ""
    for group in ("columns", "tags"):
        for key in filter(_is_comment, entry.get(group) or {}):
            yield (group, key), f"has no effect: {_no_effect(key)}", ""
    for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"):
        hub_mirror = reader.endswith("hub_url") and key.endswith("hub_url")
        if entry.get(key) and key != reader and not hub_mirror:
            yield (key,), f"is not read, since `{reader}` is given too", ""
    if not reader.endswith("hub_url"):
        for key in ("subset", "folder"):
            if entry.get(key):
                yield (key,), f"is read for hub repositories only, and the rows come from `{reader}`", ""
    if not FORMATS.get(formatting).has_roles and entry.get("tags") is not None:
        yield ("tags",), "is read by the formats sharegpt and openai only", ""
    columns = {key for key, value in (entry.get("columns") or {}).items() if value}
    for key in sorted(columns.intersection(FORMATS.get(formatting).ignores)):
        yield ("columns", key), f"is not read by the format {formatting}", ""
    if not entry.get("ranking"):
        for key in sorted(columns & {"chosen", "rejected"}):
            yield ("columns", key), "is read for ranking data only", 'add "ranking": true'
    elif "response" in columns:
        yield ("columns", "response"), "is not read for ranking data, whose answers are `chosen` and `rejected`", ""


def _winning_key(entry: Mapping[str, Any]) -> str:
    hubs = [key for key in ("hf_hub_url", "ms_hub_url", "om_hub_url") if entry.get(key)]
    if hubs:
        asked = [hub.url_key for hub in HUBS if hub.url_key in hubs and is_on(os.environ, hub.variable)]
        return (asked or hubs)[0]
    return next(key for key in ("script_url", "cloud_file_name", "file_name") if entry.get(key))


def _source(entry: Mapping[str, Any], root: str) -> Source:
    key = _winning_key(entry)
    if key == "file_name":
        if root.startswith("hf://"):
            return Source("cloud", f"{root}/{entry[key]}")
        return Source("file", _local_path(root, entry[key]))
    kinds: dict[str, SourceKind] = {
        "hf_hub_url": "hf_hub",
        "ms_hub_url": "ms_hub",
        "om_hub_url": "om_hub",
        "cloud_file_name": "cloud",
    }
    return Source(kinds[key], entry[key])


def _local_path(root: str, file_name: str) -> str:
    """A path of a file, whose folders may be separated as on Windows, where the description may have been written."""
    path = os.path.join(root, file_name)
    if "\\" not in path or os.path.exists(path):
        return path
    return os.path.join(root, file_name.replace("\\", "/"))
