"""Frames of videos, decoded by PyAV: only those that are asked for, upright, each the one shown at its time.

Frame i of n is what is shown i / fps seconds after the first one. In a video of constant rate, that is its i-th frame.
In a video of variable rate (a screen recording, some phones), fps is its average.

A file is measured without being decoded: its packets tell the times of all frames.
"""

import bisect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.core.versions import require
from luthier.data.media.reader import load_image, size_of

if TYPE_CHECKING:
    import numpy as np

    from luthier.data.media.kinds import Measure

LIST_SUFFIX = ".frames"
"""Of a file that lists the paths of frames, as JSON."""
_EARLY_SECONDS = 0.002
"""A frame counts as shown so long before its time, since containers round times."""
_LATE_FRAMES = 0.5
"""The decoder may tell another time than the container, by less than a frame."""
_LEAST_SHARE = 0.9
"""Of the frames that the header of a file promises; with fewer, the file is cut."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The times of the frames of a video stream, in the order in which they are shown."""

    stamps: tuple[int, ...]
    """Their times in ticks of the stream."""
    keys: tuple[int, ...]
    """Those that can be decoded without others."""
    tick: float
    """Seconds."""
    usual_fps: float
    """As the header says; 0 if it says nothing."""

    @property
    def fps(self) -> float:
        seconds = (self.stamps[-1] - self.stamps[0]) * self.tick
        return (len(self.stamps) - 1) / seconds if seconds else self.usual_fps

    def at(self, number: int, fps: float) -> int:
        """The time of the frame that is shown `number` / fps seconds after the first one."""
        time = self.stamps[0] + (number / fps + _EARLY_SECONDS) / self.tick
        return self.stamps[max(bisect.bisect_right(self.stamps, time) - 1, 0)]


def is_list(path: str) -> bool:
    return path.endswith(LIST_SUFFIX)


def listed(path: str) -> list[str]:
    """The paths of frames in a list."""
    with open(path, encoding="utf-8") as file:
        return [str(name) for name in json.load(file)]


def files_of(path: str) -> tuple[str, ...]:
    """A video file, or a list with its frames."""
    return (path, *listed(path)) if is_list(path) and os.path.isfile(path) else (path,)


def measure_of(path: str) -> "Measure":
    """(height, width, frames, frames a second, seconds); a list of frames has no rate and no seconds, 0 and 0.

    Raises `RowError`.
    """
    if is_list(path):
        return _measure_of_list(listed(path))
    with _opened(path) as (container, stream):
        timeline = _timeline(path, container, stream)
        expected = stream.frames
        if len(timeline.stamps) < _LEAST_SHARE * expected:
            raise RowError(
                f"{path!r} is cut: it holds {len(timeline.stamps):,} of the {expected:,} frames in its header",
                repr(path), f"{len(timeline.stamps):,}", f"{expected:,}",
            )  # fmt: skip
        if not timeline.fps:
            raise RowError(f"{path!r} does not tell how many frames it shows in a second", repr(path))
        height, width = _first(path, container, stream, timeline).shape[:2]
    num_frames = len(timeline.stamps)
    return height, width, num_frames, timeline.fps, num_frames / timeline.fps


def _measure_of_list(paths: Sequence[str]) -> "Measure":
    height, width = size_of(paths[0])
    for name in paths[1:]:
        if size_of(name) != (height, width):
            sizes = [f"{height}x{width}", "{}x{}".format(*size_of(name))]
            raise RowError(
                f"the frames of a video have different sizes: {paths[0]!r} {sizes[0]}, {name!r} {sizes[1]} pixels",
                repr(paths[0]), sizes[0], repr(name), sizes[1],
            )  # fmt: skip
    return height, width, len(paths), 0.0, 0.0


def frames_in(path: str) -> "np.ndarray":
    """All frames of a list (T, H, W, 3). Raises `RowError`."""
    import numpy as np

    return np.stack([np.asarray(load_image(name)) for name in listed(path)])


def frames_of(path: str, numbers: Sequence[int], fps: float) -> "np.ndarray":
    """The frames with these numbers (T, H, W, 3), which may repeat. Raises `RowError`."""
    import numpy as np

    with _opened(path) as (container, stream):
        timeline = _timeline(path, container, stream)
        wanted = [timeline.at(number, fps) for number in numbers]
        found = {stamp: _upright(frame) for stamp, frame in _decoded(path, container, stream, timeline, wanted)}
    return np.stack([found[stamp] for stamp in wanted])


def require_readable(path: str, numbers: Sequence[int], fps: float) -> None:
    """Decodes these frames and keeps none. Raises `RowError`."""
    if is_list(path):
        return  # measured, and so decoded
    with _opened(path) as (container, stream):
        timeline = _timeline(path, container, stream)
        for _ in _decoded(path, container, stream, timeline, [timeline.at(number, fps) for number in numbers]):
            pass


@contextmanager
def _opened(path: str) -> "Iterator[tuple[Any, Any]]":
    """(container, video stream). Raises `RowError` for a file without frames."""
    av = require("av", "video", "reading videos")
    with opened(path) as container:
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise RowError(f"{path!r} has no frames: it holds sound or text alone", repr(path))
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


@contextmanager
def opened(path: str) -> "Iterator[Any]":
    """The container of a file. Faults of PyAV become `RowError`."""
    av = require("av", "video", "reading videos")
    try:
        if not os.path.getsize(path):
            raise RowError(f"{path!r} is an empty file, not a video", repr(path))
        with av.open(path, **_settings(av.__version__)) as container:
            yield container
    except (av.FFmpegError, OSError, ValueError) as fault:
        if isinstance(fault, RowError):
            raise
        reason = " ".join(str(getattr(fault, "strerror", None) or fault).split()) or type(fault).__name__
        raise RowError(f"{path!r} cannot be read as a video: {reason}", repr(path), reason) from fault


def _settings(version: str) -> "dict[str, str]":
    """Titles and the like that are not in UTF-8 do not matter. PyAV 19 thinks so too, and takes no such setting."""
    return {"metadata_errors": "ignore"} if int(version.partition(".")[0]) < 19 else {}


def _timeline(path: str, container: Any, stream: Any) -> Timeline:
    """From the packets of the stream, none of which is decoded."""
    stamps, keys = [], []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None:
                stamps.append(stamp)
                if packet.is_keyframe:
                    keys.append(stamp)
    if not stamps:
        raise RowError(f"{path!r} holds no frames", repr(path))
    usual = stream.average_rate or stream.guessed_rate or 0
    return Timeline(tuple(sorted(set(stamps))), tuple(sorted(keys)), float(stream.time_base), float(usual))


def _first(path: str, container: Any, stream: Any, timeline: Timeline) -> "np.ndarray":
    """The first frame, which tells the size of all."""
    ((_, frame),) = _decoded(path, container, stream, timeline, timeline.stamps[:1])
    return _upright(frame)


def _decoded(
    path: str, container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """(time, frame) of the wanted times, in order of time. Between them it jumps to the nearest key frame."""
    rest = sorted(set(wanted), reverse=True)
    while rest:
        key = timeline.keys[max(bisect.bisect_right(timeline.keys, rest[-1]) - 1, 0)] if timeline.keys else rest[-1]
        container.seek(key, stream=stream, backward=True)
        before, late = len(rest), _LATE_FRAMES / (timeline.fps or 1) / timeline.tick
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < rest[-1]:
                continue
            if frame.pts > rest[-1] + late:
                break  # the frame in between could not be decoded
            yield rest.pop(), frame
            if not rest or _is_worth_a_jump(timeline, frame.pts, rest[-1]):
                break
        if len(rest) == before:
            seconds = f"{(rest[-1] - timeline.stamps[0]) * timeline.tick:.1f}"
            raise RowError(f"{path!r} has no frame that can be decoded at {seconds} s", repr(path), seconds)


def _is_worth_a_jump(timeline: Timeline, now: int, following: int) -> bool:
    """Whether a key frame lies between two frames, so that those before it need not be decoded."""
    return bisect.bisect_right(timeline.keys, following) > bisect.bisect_right(timeline.keys, now)


def _upright(frame: Any) -> "np.ndarray":
    """(H, W, 3) as it is shown, whatever way the camera was held."""
    import numpy as np

    turns = round(-frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), -turns))
