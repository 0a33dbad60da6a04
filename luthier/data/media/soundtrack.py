"""The sound of videos, decoded by PyAV: in one channel and at the rate of the model, which FFmpeg resamples to.

All channels have the same weight, as in audio files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.core.versions import require
from luthier.data.media import frames

if TYPE_CHECKING:
    import numpy as np

    from luthier.data.media.kinds import Measure


def measure_of(path: str) -> "Measure":
    """(samples of a channel, samples a second) of the sound of a video, which is decoded. Raises `RowError`."""
    num_samples = rate = 0
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            num_samples += frame.samples
            rate = frame.sample_rate
    if not num_samples:
        raise RowError(f"{path!r} has a sound track that holds no sound", repr(path))
    return num_samples, rate


def load_sound(path: str, rate: int, num_samples: int) -> "np.ndarray":
    """The first samples (N,) at `rate` a second, float32. Raises `RowError`."""
    import numpy as np

    av = require("av", "video", "reading videos")
    waves: list[np.ndarray] = []
    num_read = 0
    with _opened(path) as (container, stream):
        resampler = av.AudioResampler(format="fltp", rate=rate)
        for frame in chain(container.decode(stream), (None,)):  # None: what the resampler holds back
            for part in resampler.resample(frame):
                if part is not None:  # it holds back nothing at the rate of the file
                    waves.append(part.to_ndarray().mean(axis=0))
                    num_read += len(waves[-1])
            if num_read >= num_samples:
                break
    wave = np.concatenate(waves)[:num_samples]
    return np.ascontiguousarray(np.pad(wave, (0, num_samples - len(wave))), dtype=np.float32)


@contextmanager
def _opened(path: str) -> "Iterator[tuple[Any, Any]]":
    """(container, sound track). Raises `RowError` for a video without one."""
    if frames.is_list(path):
        raise RowError(f"{path!r} is a list of frames, without the sound that use_audio_in_video needs", repr(path))
    with frames.opened(path) as container:
        if not container.streams.audio:
            raise RowError(f"{path!r} has no sound track, which use_audio_in_video needs", repr(path))
        yield container, container.streams.audio[0]
