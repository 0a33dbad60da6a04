"""Videos: files that PyAV decodes, or lists of files with one frame each (`luthier.data.media.frames`).

The processor of the model chooses frames (`sample_frames`), and only these are decoded. They are given to it with their
times, and without being sampled again. One that listens to videos (`use_audio_in_video`) also gets their sound
(`luthier.data.media.soundtrack`), and puts its tokens between those of the frames.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.core.errors import RowError
from luthier.data.media import frames, soundtrack
from luthier.data.media.items import path_of, stored
from luthier.data.media.kinds import Measure, MediaKind, Processor, Size, listens_to_videos, media_kind
from luthier.data.media.reader import Measures, measures_in, state_of
from luthier.data.types import VIDEO_PLACE

if TYPE_CHECKING:
    import numpy as np

MEASURES_FILE, SOUNDS_FILE = "videos.jsonl", "soundtracks.jsonl"
HEAD = 6
"""The numbers of a size before those of its frames."""
MAX_FRAMES = 1024
"""Of a processor that takes all frames, so that a long video does not fill the memory."""
_USUAL_FPS = 2.0
"""Of the frames in a list, for a processor that names no rate."""
_SAMPLING_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


class Video(NamedTuple):
    """Chosen frames, and what the processor is told about them."""

    frames: Any
    """(T, H, W, 3) or (T, 3, H, W), 0 to 255."""
    size: Size
    sound: Any = None
    """(N,) samples, for a processor that listens to videos."""


def _measured(path: str) -> Measure:
    if frames.is_list(path):
        return frames.measure_of(path)  # the files in the list may change without it
    return _memory().of(path)


def _memory() -> Measures:
    return measures_in(MEASURES_FILE, frames.measure_of)


def _heard(path: str, processor: Processor) -> Measure:
    """(samples of the sound, samples a second), if the processor listens to videos."""
    return measures_in(SOUNDS_FILE, soundtrack.measure_of).of(path) if listens_to_videos(processor) else ()


def _part(processor: Processor) -> Any:
    return processor.video_processor


def _settings(processor: Processor) -> dict[str, Any]:
    """What the part is called with: its own values, and those that the class of the processor hands it."""
    part = _part(processor)
    own = {name: getattr(part, name, None) for name in part.valid_kwargs.__annotations__}
    return own | dict(getattr(processor, "videos_kwargs", None) or {})


def _metadata(measure: Sequence[float], indices: Sequence[int] | None = None) -> Any:
    from transformers.video_utils import VideoMetadata

    height, width, num_frames, fps, duration = measure[:5]
    return VideoMetadata(
        total_num_frames=int(num_frames),
        fps=fps,
        width=int(width),
        height=int(height),
        duration=duration,
        video_backend="pyav",
        frames_indices=None if indices is None else list(indices),
    )


def chosen_frames(measure: Measure, processor: Processor) -> list[int]:
    """The numbers of the frames that the processor samples. Raises `RowError` if it cannot."""
    settings, num_frames = _settings(processor), int(measure[2])
    if not settings.pop("do_sample_frames", None):
        if num_frames > MAX_FRAMES:
            raise RowError(
                f"the processor of this model takes all {num_frames:,} frames -> give video_fps", f"{num_frames:,}"
            )
        return list(range(num_frames))
    for name in ("input_data_format", "do_convert_rgb", "device", "video_metadata"):
        settings.pop(name, None)
    try:
        found = _part(processor).sample_frames(metadata=_metadata(measure), **settings)
    except _SAMPLING_FAULTS as fault:
        reason = " ".join(str(fault).split())
        raise RowError(f"the processor of this model cannot choose frames of it: {reason}", reason) from fault
    last = num_frames - 1
    return [min(max(int(index), 0), last) for index in found]


def _size(measure: Measure, processor: Processor) -> Size:
    """(height, width, frames, frames a second, seconds, samples of sound as the model hears it, number of each chosen
    frame)."""
    height, width, num_frames, fps, seconds, *sound = measure
    num_samples = media_kind("audio").size(tuple(sound), processor)[0] if sound else 0
    if fps:
        return height, width, num_frames, fps, seconds, num_samples, *chosen_frames(measure, processor)
    rate = _settings(processor).get("fps") or _USUAL_FPS
    return height, width, num_frames, rate, num_frames / rate, num_samples, *range(int(num_frames))


def _blank(size: Size, processor: Processor) -> Video:
    import torch

    height, width = int(size[0]), int(size[1])
    black = torch.zeros(1, dtype=torch.uint8).expand(len(size) - HEAD, 3, height, width)
    return Video(black, size, _made(media_kind("audio").blank, size, processor))


def _noise(size: Size, processor: Processor) -> Video:
    import numpy as np

    shape = len(size) - HEAD, int(size[0]), int(size[1]), 3
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Video(noise, size, _made(media_kind("audio").noise, size, processor))


def _made(sound: Callable[[Size, Processor], Any], size: Size, processor: Processor) -> Any:
    return sound(size[HEAD - 1 : HEAD], processor) if size[HEAD - 1] and listens_to_videos(processor) else None


def _loaded(path: str, processor: Processor) -> Video:
    sound = _heard(path, processor)
    size = _size((*_measured(path), *sound), processor)
    if not sound:
        return Video(read_frames(path, size), size)
    num_samples, rate = map(int, media_kind("audio").size(sound, processor))
    return Video(read_frames(path, size), size, soundtrack.load_sound(path, rate, num_samples))


def read_frames(path: str, size: Size) -> "np.ndarray":
    """The chosen frames (T, H, W, 3). Raises `RowError`."""
    return frames.frames_in(path) if frames.is_list(path) else frames.frames_of(path, _numbers(size), size[3])


def _numbers(size: Size) -> list[int]:
    """Those of the chosen frames."""
    return [int(number) for number in size[HEAD:]]


def _left(measure: Measure, processor: Processor) -> tuple[str, ...]:
    """What the window of the processor leaves out of the sound."""
    return media_kind("audio").left(measure[HEAD - 1 :], processor) if len(measure) >= HEAD else ("",)


@functools.lru_cache(maxsize=1 << 14)
def _require_readable(path: str, state: tuple[int, int] | None, size: Size) -> None:
    frames.require_readable(path, _numbers(size), size[3])


def _given(samples: Sequence[Sequence[Video]], processor: Processor) -> dict[str, Any]:
    videos = [video for some in samples for video in some]
    settings = {"do_sample_frames": False, "return_tensors": "pt"}
    fps = _settings(processor).get("fps")
    if fps is not None and getattr(processor, "load_audio_from_video", None) is not None:
        settings["fps"] = fps  # Qwen-Omni counts the seconds of a group of frames by it
    metadata = [_metadata(video.size, _numbers(video.size)) for video in videos]
    return {"videos": [video.frames for video in videos], "videos_kwargs": {**settings, "video_metadata": metadata}}


def _shown(measure: Measure) -> str:
    height, width, num_frames, fps, duration = measure[:5]
    if not fps:
        return f"{height:.0f}x{width:.0f}, {num_frames:.0f} frames"
    chosen = f", {len(measure) - HEAD} of {num_frames:.0f} frames" if len(measure) > HEAD else ""
    return f"{height:.0f}x{width:.0f}, {duration:.3g} s{chosen}"


def _path_of(value: Any, place: str) -> str:
    """Of a list of frames, that of a file with the list."""
    if not isinstance(value, (list, tuple)):
        return path_of(value, place, "video")
    if not value:
        raise RowError(f"{place} is a list without frames")
    paths = [path_of(item, f"frame {number} of {place}", "image") for number, item in enumerate(value, start=1)]
    return stored_list(paths)


def stored_list(paths: Sequence[str]) -> str:
    return stored(json.dumps(list(paths)).encode(), suffix=frames.LIST_SUFFIX)


def in_folder(path: str, folder: str) -> str:
    """The list of frames in `path` with its relative paths starting from `folder`; other files as they are."""
    if not frames.is_list(path):
        return path
    return stored_list([os.path.abspath(os.path.join(folder, name)) for name in frames.listed(path)])


KIND = MediaKind(
    name="video",
    noun="a video",
    one="video",
    column="videos",
    place=VIDEO_PLACE,
    tag=("VIDEO_PLACEHOLDER", "<video>"),
    parts=("video", "video_url", "input_video"),
    keys=("video", "video_url", "url", "path", "bytes", "base64", "value"),
    path_of=_path_of,
    measured=_measured,
    size=_size,
    blank=_blank,
    noise=_noise,
    loaded=_loaded,
    given=_given,
    others=(list, tuple),
    library="av",
    extra="video",
    former=lambda path: _memory().known(path),
    of_loaded=lambda video: _shown(video.size),
    shown=_shown,
    heard=_heard,
    sound_in=lambda video: video.sound,
    left=_left,
    require_readable=lambda path, size: _require_readable(path, state_of(path), size),
    files=frames.files_of,
    in_folder=in_folder,
)
