"""The media of a row: which files they are, and where they stand in its messages.

A dataset that declares a column of media has a tag (`<image>`, `<video>`, `<audio>`) for each of its items, in order.
A part of a content that brings its own item stands between `OPEN` and `CLOSE` until all are in order.
After `placed`, every item of an example is one character, the place of its kind. No tokenizer sees these characters:
Unicode keeps them for programs.
"""

import base64
import functools
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import MediaFault, RowError
from luthier.core.files import write_atomically
from luthier.core.paths import cache_root
from luthier.data.media.kinds import MediaKind, kind_of, media_kind, media_kinds, path_in
from luthier.data.types import PLACES, Example, Feedback, Media, Message, Preference, Span

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec

OPEN, CLOSE = "\ufdd1", "\ufdd2"
_OWN = re.compile(f"[{''.join(PLACES)}{OPEN}{CLOSE}]")


def declared_kinds(spec: "DatasetSpec") -> tuple[MediaKind, ...]:
    """The kinds of media that a dataset has columns for."""
    return tuple(kind for kind in media_kinds() if column_of(spec, kind))


def column_of(spec: "DatasetSpec", kind: MediaKind) -> str | None:
    columns = spec.columns
    return columns.images if kind.name == "image" else columns.videos if kind.name == "video" else columns.audios


def media_path(path: str, spec: "DatasetSpec") -> str:
    """Relative paths start from `media_dir`. Rows from a hub or a cloud keep theirs: the files are elsewhere."""
    return os.path.abspath(os.path.join(spec.media_dir, path)) if _is_local(path, spec) else path


def item_in(path: str, kind: MediaKind, spec: "DatasetSpec") -> str:
    """The item of a path in the data, whose relative paths start from `media_dir`."""
    path = media_path(path, spec)
    return kind.item(kind.in_folder(path, spec.media_dir) if _is_local(path, spec) else path)


def stored(content: bytes, folder: Path | None = None, suffix: str = "") -> str:
    """The path of a file with this content, which is written once, in `folder` or that of the cache."""
    file = (folder or cache_root() / "media") / f"{hashlib.sha256(content).hexdigest()}{suffix}"
    if file.is_file() and (state := file.stat()).st_size == len(content):
        # The time of access says which files are used. That of the change says that they are the same.
        with suppress(PermissionError):  # another user, who shares the cache, has written it
            os.utime(file, ns=(time.time_ns(), state.st_mtime_ns))
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    return str(file)


def path_of(item: Any, place: str, name: str = "image") -> str:
    """The path in an item: a path, the address of data (`data:image/png;base64,...`), bytes, or an object with `bytes`
    or `path`. `place` names the item in messages, and `name` its kind. Raises `RowError`."""
    if isinstance(item, Mapping):
        if item.get("bytes") is not None:
            item = item["bytes"]
        elif item.get("path") is not None:
            item = item["path"]
        else:
            raise RowError(f"{place} is an object without 'bytes' and 'path'")
    if isinstance(item, bytes):
        return stored(item)
    if not isinstance(item, str):
        what = "null" if item is None else f"of type {type(item).__name__}"
        raise RowError(f"{place} is {what}, not a path")
    if not item:
        raise RowError(f"{place} is empty, not a path")
    if not item.startswith("data:"):
        return item
    try:
        return stored(decoded(item))
    except ValueError as fault:
        raise RowError(f"{place} is not {name} data in base64: {fault}", str(fault)) from fault


def decoded(address: str) -> bytes:
    """The content of `data:image/png;base64,...`. Raises `ValueError` that says what is wrong."""
    head, comma, text = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("it does not begin with data:TYPE;base64,")
    return base64.b64decode(text, validate=True)


def in_text(path: str, kind: MediaKind) -> str:
    """The path of an item in a content, where it stands."""
    return f"{OPEN}{kind.place}{path}{CLOSE}"


def with_tags(text: str) -> str:
    """The text with the tag of its kind in each place, as data have it."""
    for kind in media_kinds():
        text = text.replace(kind.place, kind.written_tag)
    return text


def placed(example: Example, spec: "DatasetSpec") -> Example:
    """The example with a place for each item, and its `items` in the order of these places.

    Raises `RowError` if there are more tags than items or fewer, and for a tag where none can be.
    """
    kinds = declared_kinds(spec)
    if not kinds:
        return example
    given = example.media
    placer = _Placer(spec, kinds)
    messages = example.prompt if isinstance(example, Preference) else example.messages
    asked = messages[:-1] if isinstance(example, Feedback) else messages
    done = tuple(map(placer.message, asked))
    placer.refuse(example.system or "", "the system text", only_parts=True)
    if isinstance(example, Preference):
        for answer in (example.chosen, example.rejected):
            placer.refuse(answer.content, "an answer that is compared with another one")
        changed: Example = replace(example, prompt=done)
    elif isinstance(example, Feedback):
        placer.refuse(messages[-1].content, "an answer with a like or a dislike")
        changed = replace(example, messages=(*done, messages[-1]))
    else:
        changed = replace(example, messages=done)
    of_column = {kind.name: [item for item in given.items if kind_of(item) is kind] for kind in kinds}
    for kind in kinds:
        num_tags, num_items = placer.num_tags[kind.name], kind.named(len(of_column[kind.name]))
        if num_tags != len(of_column[kind.name]):
            tags = f"{num_tags or 'no'} {kind.written_tag} tag{'s' * (num_tags != 1)}"
            raise RowError(
                f"the text has {tags}, and column {column_of(spec, kind)!r} has {num_items} -> write one tag for each"
                f" {kind.one}, where it stands",
                tags,
                num_items,
            )
    return replace(changed, media=Media(tuple(placer.items({name: iter(own) for name, own in of_column.items()}))))


@functools.cache
def _pattern_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    """Finds tags, and paths that parts bring along."""
    return re.compile(f"({'|'.join(map(re.escape, tags))})|{OPEN}([{''.join(PLACES)}])([^{CLOSE}]*){CLOSE}")


class _Placer:
    """Replaces tags and paths in messages, one after the other."""

    def __init__(self, spec: "DatasetSpec", kinds: tuple[MediaKind, ...]) -> None:
        self.spec = spec
        self.num_tags = dict.fromkeys((kind.name for kind in kinds), 0)
        self._found: list[tuple[MediaKind, str | None]] = []
        """The kind of each item, and the path if a part brings it along; None for a tag."""
        self._by_tag = {kind.written_tag: kind for kind in kinds}
        self._by_place = {kind.place: kind for kind in media_kinds()}
        self._pattern = _pattern_of(tuple(self._by_tag))

    def message(self, message: Message) -> Message:
        content, loss = message.content, message.loss
        if not self._pattern.search(content) and not _OWN.search(content):
            return message
        if _OWN.search(self._pattern.sub("", content)):
            raise RowError("the text holds a character that Unicode keeps for programs (U+FDD0 to U+FDD4)")
        cuts = []
        for match in self._pattern.finditer(content):
            cuts.append((match.start(), match.end()))
            kind = self._kind(match)
            self._found.append((kind, None if match[1] else item_in(match[3], kind, self.spec)))
            if match[1]:
                self.num_tags[kind.name] += 1
        if isinstance(loss, tuple):
            if OPEN in content:
                raise RowError("spans of 'loss' cannot count characters in a list of parts with an image")
            loss = tuple(Span(_moved(span.start, cuts), _moved(span.end, cuts), span.weight) for span in loss)
        results = tuple(replace(result, content=self._places(result.content)) for result in message.results)
        return replace(message, content=self._places(content), loss=loss, results=results)

    def _kind(self, match: re.Match[str]) -> MediaKind:
        return self._by_tag[match[1]] if match[1] else self._by_place[match[2]]

    def _places(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._kind(match).place, text)

    def refuse(self, text: str, where: str, *, only_parts: bool = False) -> None:
        """Raises `RowError` for an item in a text that cannot have one."""
        found = next((match for match in self._pattern.finditer(text) if not only_parts or not match[1]), None)
        if found is not None:
            raise RowError(f"{self._kind(found).noun} stands in {where}, and only the other messages can have one")

    def items(self, given: Mapping[str, Iterator[str]]) -> Iterator[str]:
        """All in order: those of parts, and those of the columns for the tags."""
        for kind, own in self._found:
            yield next(given[kind.name]) if own is None else own


def _moved(position: int, cuts: list[tuple[int, int]]) -> int:
    """Where a character is after each of `cuts` (start, end) has become one character."""
    gone = 0
    for start, end in cuts:
        if position >= end:
            gone += end - start - 1
        elif position > start:
            return start - gone + 1
    return position - gone


def require_usable(media: Media, spec: "DatasetSpec", *, takes: Collection[str] = ()) -> None:
    """Raises `MediaFault` for a file that is missing, and `RowError` for what the model cannot take. `takes`: the names
    of the kinds that it does."""
    for item in media.items:
        kind, path = kind_of(item), path_in(item)
        column = column_of(spec, kind)
        if "://" in path:
            raise MediaFault(f"column {column!r} names {path!r}: {kind.plural} are read from files only", repr(path))
        for file in kind.files(path):
            if not os.path.isfile(file):
                what = "is a folder, not a file" if os.path.isdir(file) else "is not a file"
                folder = spec.media_dir or "."
                raise MediaFault(f"column {column!r} names {file!r}, which {what} (media_dir is {folder})", repr(file))
    for item in media.items:
        kind = kind_of(item)
        if kind.name not in takes:
            others = " and ".join(media_kind(name).plural for name in takes)
            others = f"reads text and {others} only" if takes else "reads text only"
            raise RowError(f"the row has {kind.plural}, and the model {others}")


def _is_local(path: str, spec: "DatasetSpec") -> bool:
    return spec.source.kind == "file" and "://" not in path
