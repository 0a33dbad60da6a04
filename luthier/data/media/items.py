"""The images of a row: which files they are, and where they stand in its messages.

A dataset that declares a column of images has a tag (`<image>`) for each of them, in the order of the column. A part of
a content that brings its own image stands between `OPEN` and `CLOSE` until all are in order. After `placed`, every
image of an example is one character, `PLACE`. No tokenizer sees these three: Unicode keeps them for programs.
"""

import base64
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import MediaFault, RowError
from luthier.core.files import write_atomically
from luthier.core.paths import cache_root
from luthier.data.types import PLACE, Example, Feedback, Media, Message, Preference, Span

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec

OPEN, CLOSE = "\ufdd1", "\ufdd2"
_OWN = re.compile(f"[{PLACE}{OPEN}{CLOSE}]")


def image_tag() -> str:
    """What stands for an image in the text of data; `IMAGE_PLACEHOLDER` of the environment is another one."""
    return os.environ.get("IMAGE_PLACEHOLDER") or "<image>"


def media_path(path: str, spec: "DatasetSpec") -> str:
    """Relative paths start from `media_dir`. Rows from a hub or a cloud keep theirs: the files are elsewhere."""
    return os.path.abspath(os.path.join(spec.media_dir, path)) if _is_local(path, spec) else path


def stored(content: bytes, folder: Path | None = None) -> str:
    """The path of a file with this content, which is written once, in `folder` or that of the cache."""
    file = (folder or cache_root() / "media") / hashlib.sha256(content).hexdigest()
    if file.is_file() and (state := file.stat()).st_size == len(content):
        # The time of access says which images are used. That of the change says that they are the same.
        os.utime(file, ns=(time.time_ns(), state.st_mtime_ns))
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    return str(file)


def path_of(item: Any, place: str) -> str:
    """The path in an item: a path, the address of data (`data:image/png;base64,...`), bytes, or an object with `bytes`
    or `path`. `place` names the item in messages. Raises `RowError`."""
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
        raise RowError(f"{place} is no image in base64: {fault}", str(fault)) from fault


def decoded(address: str) -> bytes:
    """The content of `data:image/png;base64,...`. Raises `ValueError` that says what is wrong."""
    head, comma, text = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("it does not begin with data:image/...;base64,")
    return base64.b64decode(text, validate=True)


def in_text(path: str) -> str:
    """The path of an image in a content, where it stands."""
    return f"{OPEN}{path}{CLOSE}"


def placed(example: Example, spec: "DatasetSpec") -> Example:
    """The example with `PLACE` for each image, and its images in the order of these places.

    Raises `RowError` if there are more tags than images or fewer, and for a tag where none can be.
    """
    if not spec.columns.images:
        return example
    given = example.media.images
    placer = _Placer(spec)
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
    if placer.num_tags != len(given):
        raise RowError(
            f"the text has {_count(placer.num_tags, f'{image_tag()} tag')}, and column {spec.columns.images!r} has"
            f" {_count(len(given), 'image')} -> write one tag for each image, where it stands",
            _count(placer.num_tags, f"{image_tag()} tag"),
            _count(len(given), "image"),
        )
    images = tuple(placer.images(iter(given)))
    return replace(changed, media=replace(example.media, images=images))


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' if number != 1 else ''}"


@functools.cache
def _pattern_of(tag: str) -> re.Pattern[str]:
    """Finds tags, and paths that parts bring along."""
    return re.compile(f"{re.escape(tag)}|{OPEN}([^{CLOSE}]*){CLOSE}")


class _Placer:
    """Replaces tags and paths in messages, one after the other."""

    def __init__(self, spec: "DatasetSpec") -> None:
        self.spec = spec
        self.num_tags = 0
        self._found: list[str | None] = []
        """The path of an image that a part brings along; None for a tag."""
        self._pattern = _pattern_of(image_tag())

    def message(self, message: Message) -> Message:
        content, loss = message.content, message.loss
        if image_tag() not in content and not _OWN.search(content):
            return message
        if _OWN.search(self._pattern.sub("", content)):
            raise RowError("the text holds a character that Unicode keeps for programs (U+FDD0 to U+FDD2)")
        cuts = []
        for match in self._pattern.finditer(content):
            cuts.append((match.start(), match.end()))
            self._found.append(match[1] if match[1] is None else media_path(match[1], self.spec))
            self.num_tags += match[1] is None
        if isinstance(loss, tuple):
            if OPEN in content:
                raise RowError("spans of 'loss' cannot count characters in a list of parts with an image")
            loss = tuple(Span(_moved(span.start, cuts), _moved(span.end, cuts), span.weight) for span in loss)
        results = tuple(replace(result, content=self._pattern.sub(PLACE, result.content)) for result in message.results)
        return replace(message, content=self._pattern.sub(PLACE, content), loss=loss, results=results)

    def refuse(self, text: str, where: str, *, only_parts: bool = False) -> None:
        """Raises `RowError` for an image in a text that cannot have one."""
        if OPEN in text or (not only_parts and image_tag() in text):
            raise RowError(f"an image stands in {where}, and only the other messages can have one")

    def images(self, given: Iterator[str]) -> Iterator[str]:
        """All in order: those of parts, and those of the column for the tags."""
        for own in self._found:
            yield next(given) if own is None else own


def _moved(position: int, cuts: list[tuple[int, int]]) -> int:
    """Where a character is after each of `cuts` (start, end) has become one character."""
    gone = 0
    for start, end in cuts:
        if position >= end:
            gone += end - start - 1
        elif position > start:
            return start - gone + 1
    return position - gone


def require_usable(media: Media, spec: "DatasetSpec", *, sees: bool = False) -> None:
    """Raises `MediaFault` for a file that is missing, and `RowError` for what the model cannot take. `sees`: it takes
    images."""
    columns = spec.columns
    named = ((columns.images, media.images), (columns.videos, media.videos), (columns.audios, media.audios))
    for column, paths in named:
        for path in paths:
            if "://" in path and column == columns.images:
                raise MediaFault(f"column {column!r} names {path!r}: images are read from files only", repr(path))
            if (_is_local(path, spec) or column == columns.images) and not os.path.isfile(path):
                what = "is a folder, not a file" if os.path.isdir(path) else "is not a file"
                folder = spec.media_dir or "."
                raise MediaFault(f"column {column!r} names {path!r}, which {what} (media_dir is {folder})", repr(path))
    if media.videos or media.audios:
        raise RowError("the row has videos or audio, and this version reads text and images only")
    if media.images and not sees:
        raise RowError("the row has images, and the model reads text only")


def _is_local(path: str, spec: "DatasetSpec") -> bool:
    return spec.source.kind == "file" and "://" not in path
