"""The kinds of media that rows may have: `image`, `video` and `audio`, one file each.

A kind says how an item is named in data, read, measured and given to a processor. Everything else is the same for all:
tags and places, blocks, labels, truncation, batches, chat and requests.

An *item* is the path of an image, or the path of another kind with the name of the kind before it: `audio:/a/b.wav`.
So one list of texts holds the items of a row in the order of their places.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from luthier.core.errors import RowError
from luthier.core.kinds import MEDIA_KINDS
from luthier.core.versions import require
from luthier.data.media.reader import State, state_of

Measure = tuple[float, ...]
"""What a file holds, in numbers of its kind: the height and width of an image."""
Size = tuple[float, ...]
"""What of it decides the text of its block, for one processor."""
Processor = Any
"""A `ProcessorMixin` of transformers."""


class Shape(NamedTuple):
    """Items of equal shape have the same block."""

    kind: str
    size: Size


class Examined(NamedTuple):
    """What is known of an item once its file has been read."""

    measure: Measure
    """All that decides its size."""
    shape: Shape


class Loaded(NamedTuple):
    """An item as a processor takes it."""

    kind: str
    content: Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MediaKind:
    """What differs between kinds."""

    name: str
    noun: str
    """an image, a video, audio"""
    one: str
    """image, video, audio file"""
    column: str
    """Of a dataset, and the argument of `luthier.chat`: images."""
    place: str
    """The character that stands for an item in the text of a message."""
    tag: tuple[str, str]
    """(variable of the environment, what stands for an item in the text of data unless the variable says so)."""
    parts: tuple[str, ...]
    """Values of `type` of the parts of a content that hold one."""
    keys: tuple[str, ...]
    """Where such a part has it."""
    path_of: Callable[[Any, str], str]
    """(value in the data, its place) -> path. Raises `RowError`."""
    measured: Callable[[str], Measure]
    """Reads the whole file the first time. Raises `RowError` for one that cannot be read."""
    size: Callable[[Measure, Processor], Size]
    """Raises `RowError` for an item that the processor cannot take."""
    blank: Callable[[Size, Processor], Any]
    """An item of this size without content: black, silent."""
    noise: Callable[[Size, Processor], Any]
    """An item of this size with some content."""
    loaded: Callable[[str, Processor], Any]
    """The content of a file as the processor takes it. Raises `RowError`."""
    given: Callable[[Sequence[Sequence[Any]], Processor], dict[str, Any]]
    """The arguments of a processor for the items of each sample."""
    former: Callable[[str], Measure | None]
    """What was measured last of a file, by this process or one before; None if it never was."""
    of_loaded: Callable[[Any], str]
    """The size of what `loaded` gave, for people."""
    shown: Callable[[Measure], str]
    """For people: 56x84. Takes measures and sizes."""
    others: tuple[type, ...] = ()
    """Types of values in a column besides texts, bytes and objects."""
    library: str = ""
    """The library that reads files, and `extra`: what brings it; empty if every installation has it."""
    extra: str = ""
    unit: str = ""
    """What `shown` is in: pixels."""
    require_readable: Callable[[str, Size], None] = lambda path, size: None
    """Raises `RowError` for content that `measured` has not looked at, and that cannot be read."""
    files: Callable[[str], tuple[str, ...]] = lambda path: (path,)
    """The files that an item consists of."""
    in_folder: Callable[[str, str], str] = lambda path, folder: path
    """(path, folder) -> the path of an item whose own relative paths start from `folder`."""
    heard: Callable[[str, Processor], Measure] = lambda path, processor: ()
    """What else is measured of a file for this processor: the sound of a video. Raises `RowError`."""
    sound_in: Callable[[Any], Any] = lambda content: None
    """The sound in what `loaded` gave: that of a video. None if there is none, or if it is not used."""
    left: Callable[[Measure, Processor], tuple[str, ...]] = lambda measure, processor: ("",)
    """(what the processor would leave out, in words, and what of it comes from the file); empty words if nothing."""

    @property
    def written_tag(self) -> str:
        """What stands for an item in the text of data."""
        variable, usual = self.tag
        return os.environ.get(variable) or usual

    @property
    def plural(self) -> str:
        return self.name if self.name == "audio" else f"{self.name}s"

    def require_libraries(self) -> None:
        """Raises `MissingExtra`."""
        if self.library:
            require(self.library, self.extra, f"reading {self.plural}")

    def named(self, count: int) -> str:
        """2 images, 1 video, no audio files"""
        return f"{count or 'no'} {self.one}{'s' * (count != 1)}"

    def item(self, path: str) -> str:
        return path if self.name == "image" else f"{self.name}:{path}"

    def mark_of(self, processor: Processor) -> str | None:
        """What stands for an item in a text that is given to the processor; None if it takes none."""
        mark = getattr(processor, f"{self.name}_token", None)
        return mark if isinstance(mark, str) else None


@functools.cache
def media_kind(name: str) -> MediaKind:
    kind: MediaKind = MEDIA_KINDS.get(name)
    return kind


@functools.cache
def media_kinds() -> tuple[MediaKind, ...]:
    """All of them, images first."""
    return tuple(media_kind(name) for name in ("image", *(name for name in MEDIA_KINDS.names if name != "image")))


def kind_of(item: str) -> MediaKind:
    name, colon, _ = item.partition(":")
    return media_kind(name if colon and name in MEDIA_KINDS.names else "image")


def path_in(item: str) -> str:
    kind = kind_of(item)
    return item if kind.name == "image" else item.partition(":")[2]


def files_of(item: str) -> tuple[str, ...]:
    """The files that an item consists of."""
    return kind_of(item).files(path_in(item))


def states_of(item: str) -> list[State | None]:
    """What tells whether one of the files of an item has changed."""
    return [state_of(file) for file in files_of(item)]


def by_kind(items: Sequence[str]) -> dict[MediaKind, list[str]]:
    """The items of each kind, for those kinds that there are."""
    found = {kind: [item for item in items if kind_of(item) is kind] for kind in media_kinds()}
    return {kind: own for kind, own in found.items() if own}


def by_column(items: Sequence[str]) -> dict[str, list[str]]:
    """Column of a dataset -> the paths of that kind, for those kinds that there are."""
    return {kind.column: list(map(path_in, own)) for kind, own in by_kind(items).items()}


def examined(item: str, processor: Processor) -> Examined:
    """The file is read the first time. Raises `RowError` with the path."""
    kind, path = kind_of(item), path_in(item)
    measure = *kind.measured(path), *kind.heard(path, processor)
    try:
        size = kind.size(measure, processor)
    except RowError as fault:
        raise RowError(f"{path!r}: {fault}", repr(path), *fault.quoted) from fault
    kind.require_readable(path, size)
    return Examined(measure, Shape(kind.name, size))


def load(item: str, processor: Processor) -> Loaded:
    """Raises `RowError` for a file that cannot be read."""
    kind = kind_of(item)
    return Loaded(kind.name, kind.loaded(path_in(item), processor))


def arguments_for(samples: Sequence[Sequence[Loaded]], processor: Processor) -> dict[str, Any]:
    """The arguments of a processor for the items of samples, in their order."""
    found: dict[str, Any] = {}
    for kind in media_kinds():
        own = [[loaded.content for loaded in sample if loaded.kind == kind.name] for sample in samples]
        if any(own):
            found |= kind.given(own, processor)
    return found | _sounds_for(samples, processor) if listens_to_videos(processor) else found


def _sounds_for(samples: Sequence[Sequence[Loaded]], processor: Processor) -> dict[str, Any]:
    """The arguments for audio, and for the sound of videos between it: all in the order of the text."""
    waves: list[Any] = []
    sources: list[int | None] = []
    num_videos = 0
    for loaded in (one for sample in samples for one in sample):
        sound = media_kind(loaded.kind).sound_in(loaded.content)
        if loaded.kind == "audio" or sound is not None:
            waves.append(loaded.content if sound is None else sound)
            sources.append(None if sound is None else num_videos)
        num_videos += loaded.kind == "video"
    if all(source is None for source in sources):
        return {"load_audio_from_video": False}
    given = media_kind("audio").given([waves], processor)
    return {**given, "load_audio_from_video": True, "audio_from_video_indices": sources}


def listens_to_videos(processor: Processor) -> bool:
    """Whether the processor takes the sound of videos (`use_audio_in_video`)."""
    return bool(getattr(processor, "load_audio_from_video", False))


def marks_of(processor: Processor) -> Mapping[str, str]:
    """Name of a kind -> what stands for an item of it in a text that is given to the processor."""
    found = {kind.name: kind.mark_of(processor) for kind in media_kinds()}
    return {name: mark for name, mark in found.items() if mark is not None}
