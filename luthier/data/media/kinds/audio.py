"""Audio: wav, flac, ogg and mp3, read by soundfile, in one channel and at the rate of the model (soxr).

The processors of Whisper's relatives look at a window of 30 seconds and leave out what comes after it. So only the
window is read for training, and what is lost is reported (`left`).
"""

import hashlib
import inspect
import io
import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.core.files import write_atomically
from luthier.core.paths import cache_root
from luthier.core.versions import require
from luthier.data.media.items import path_of
from luthier.data.media.kinds import Measure, MediaKind, Processor, Size
from luthier.data.media.reader import Measures, measures_in, state_of
from luthier.data.types import AUDIO_PLACE

if TYPE_CHECKING:
    import numpy as np

MEASURES_FILE = "audios.jsonl"
_CHUNK_SAMPLES = 1 << 18
_MARGIN_SAMPLES = 4096
"""Read beyond the window, so that its end is resampled as in the whole file."""
_LEAST_CUT = 4608
"""Samples that a file may have fewer than its header says: the padding of mp3."""
_CUT = "should be"
"""What libsndfile notes about a wav file with fewer bytes than its header says."""


def measure_of(path: str) -> Measure:
    """(samples of a channel, samples a second) of a file, which is decoded. Raises `RowError`."""
    num_samples = 0
    with _opened(path) as file:
        is_checked = file.format in ("FLAC", "MP3")
        if not is_checked and _CUT in "".join(
            line for line in file.extra_info.splitlines(True) if line.startswith("data")
        ):
            raise RowError(f"{path!r} is cut: it holds less sound than its header says", repr(path))
        expected = file.frames if is_checked else 0
        read = _read_integers if file.subtype.startswith("PCM_") else _read_floats
        try:
            # Each call gives up the lock of the interpreter and waits for it again, so the last empty one is left out.
            while not (file.seekable() and num_samples == file.frames) and (num_read := read(file, path)):
                num_samples += num_read
        except RuntimeError as fault:
            raise _unreadable(path, fault) from fault
        rate = file.samplerate
    if expected - num_samples > _LEAST_CUT:
        raise RowError(f"{path!r} is cut: it holds less sound than its header says", repr(path))
    if not num_samples:
        raise RowError(f"{path!r} holds no sound: it has 0 samples", repr(path))
    return num_samples, rate


class _Space(threading.local):
    """Where a thread puts samples that it only counts."""

    def __init__(self) -> None:
        self.content = memoryview(bytearray(2 * _CHUNK_SAMPLES))


_space = _Space()


def _read_integers(file: Any, path: str) -> int:
    """The number of samples in the next part of a file."""
    return int(file.buffer_read_into(_space.content[: 2 * file.channels * (_CHUNK_SAMPLES // file.channels)], "int16"))


def _read_floats(file: Any, path: str) -> int:
    """The same for a file that may hold what is no number."""
    np = require("numpy", "audio", "reading audio")
    chunk = file.read(_CHUNK_SAMPLES, dtype="float32", always_2d=True)
    if not np.isfinite(chunk).all():
        raise RowError(f"{path!r} holds samples that are not numbers (NaN or infinity)", repr(path))
    return len(chunk)


def load_audio(path: str, rate: int, most_samples: int | None = None) -> "np.ndarray":
    """The first `most_samples` samples (N,) at `rate` a second, float32. Raises `RowError`."""
    import numpy as np

    with _opened(path) as file:
        own = file.samplerate
        most = -1 if most_samples is None else math.ceil(most_samples * own / rate) + _MARGIN_SAMPLES
        try:
            wave = file.read(most, dtype="float32", always_2d=True).mean(axis=1)
        except RuntimeError as fault:
            raise _unreadable(path, fault) from fault
    if own != rate:
        soxr = require("soxr", "audio", "reading audio of another rate than the model's")
        wanted = num_resampled(len(wave), own, rate)
        wave = soxr.resample(wave, own, rate, quality="HQ")
        wave = np.pad(wave, (0, max(0, wanted - len(wave))))[:wanted]
    return np.ascontiguousarray(wave[:most_samples], dtype=np.float32)


def num_resampled(num_samples: int, own: int, rate: int) -> int:
    return math.ceil(num_samples * rate / own)


def _opened(path: str) -> Any:
    soundfile = require("soundfile", "audio", "reading audio")
    try:
        file = soundfile.SoundFile(path)
    except (RuntimeError, OSError, TypeError) as fault:
        _require_bytes(path)
        raise _unreadable(path, fault) from fault
    if not file.frames:
        _require_bytes(path)
    return file


def _require_bytes(path: str) -> None:
    """Raises `RowError` for an empty file."""
    state = state_of(path)
    if state is not None and not state[0]:
        raise RowError(f"{path!r} is an empty file, not audio", repr(path))


def _unreadable(path: str, fault: Exception) -> RowError:
    reason = " ".join(str(fault).replace(f"Error opening {path!r}: ", "").split()) or type(fault).__name__
    return RowError(f"{path!r} cannot be read as audio: {reason}", repr(path), reason)


def _measured(path: str) -> Measure:
    return _memory().of(path)


def _memory() -> Measures:
    return measures_in(MEASURES_FILE, measure_of)


def _part(processor: Processor) -> Any:
    return getattr(processor, "feature_extractor", None) or processor.audio_processor


def window_of(processor: Processor) -> int | None:
    """The samples that the processor looks at; None if it looks at all."""
    part = _part(processor)
    own = getattr(part, "n_samples", None)  # of Whisper's
    if own is not None:
        return int(own)
    parameters = inspect.signature(type(part).__call__).parameters
    most = parameters.get("max_length")
    cuts = "truncation" in parameters and parameters["truncation"].default is True
    return most.default if cuts and most is not None and isinstance(most.default, int) else None


def _size(measure: Measure, processor: Processor) -> Size:
    rate = int(_part(processor).sampling_rate)
    num_samples = num_resampled(int(measure[0]), int(measure[1]), rate)
    return min(num_samples, window_of(processor) or num_samples), rate


def _blank(size: Size, processor: Processor) -> "np.ndarray":
    import numpy as np

    return np.zeros(int(size[0]), dtype=np.float32)


def _noise(size: Size, processor: Processor) -> "np.ndarray":
    import numpy as np

    return np.random.default_rng(0).uniform(-1, 1, int(size[0])).astype(np.float32)


def _loaded(path: str, processor: Processor) -> "np.ndarray":
    return load_audio(path, int(_part(processor).sampling_rate), window_of(processor))


def _given(samples: "Sequence[Sequence[np.ndarray]]", processor: Processor) -> dict[str, Any]:
    waves = [wave for some in samples for wave in some]
    return {
        "audio": waves,
        "audio_kwargs": {"sampling_rate": int(_part(processor).sampling_rate), "return_tensors": "pt"},
    }


def _left(measure: Measure, processor: Processor) -> tuple[str, ...]:
    window, rate = window_of(processor), int(_part(processor).sampling_rate)
    if window is None or num_resampled(int(measure[0]), int(measure[1]), rate) <= window:
        return ("",)
    whole = _shown(measure)
    return f"has {whole} of sound, and the model hears the first {window / rate:g} s", whole


def _shown(measure: Measure) -> str:
    num_samples, rate = measure[:2]
    return f"{num_samples / rate:.3g} s"


def _path_of(value: Any, place: str) -> str:
    """Also of `{"array": [...], "sampling_rate": 16000}`, as `datasets` has it."""
    if not isinstance(value, Mapping) or value.get("array") is None or value.get("bytes") is not None:
        return path_of(value, place, "audio")
    import numpy as np

    soundfile = require("soundfile", "audio", "reading audio")
    try:
        wave, rate = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
        if wave.ndim > 2 or not wave.size or rate < 1:
            raise ValueError("it is not a list of samples")
    except (ValueError, TypeError, LookupError) as fault:
        raise RowError(f"{place} is not audio with 'array' and 'sampling_rate': {fault}", str(fault)) from fault
    # The header of such a file holds the time, so its name is a hash of the samples.
    name = hashlib.sha256(wave.tobytes() + str((wave.shape, rate)).encode()).hexdigest()
    file = cache_root() / "media" / f"{name}.wav"
    if not file.is_file():
        content = io.BytesIO()
        soundfile.write(content, wave, rate, subtype="FLOAT", format="WAV")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
    return str(file)


KIND = MediaKind(
    name="audio",
    noun="audio",
    one="audio file",
    column="audios",
    place=AUDIO_PLACE,
    tag=("AUDIO_PLACEHOLDER", "<audio>"),
    parts=("audio", "audio_url", "input_audio"),
    keys=("audio", "audio_url", "input_audio", "url", "path", "bytes", "base64", "value"),
    path_of=_path_of,
    measured=_measured,
    size=_size,
    blank=_blank,
    noise=_noise,
    loaded=_loaded,
    given=_given,
    library="soundfile",
    extra="audio",
    former=lambda path: _memory().known(path),
    of_loaded=lambda wave: f"{len(wave):,} samples",
    shown=_shown,
    left=_left,
)
