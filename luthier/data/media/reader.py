"""Opens images: measuring, training and chat see the same pixels.

An image is upright (its EXIF orientation is applied) and in RGB. Sizes, like the measures of the other kinds of media,
are remembered in the folder of the cache by path, bytes and time of change, so that a file is decoded once to be
measured.
"""

import functools
import json
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.core.paths import cache_root
from luthier.core.versions import require

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""(height, width) in pixels."""
State = tuple[int, int]
"""(bytes, time of the last change in nanoseconds) of a file."""
SIZES_FILE = "sizes.jsonl"
_FAULTS = (
    OSError,  # an unknown kind of file, a cut one
    SyntaxError,  # a broken PNG
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for damaged files, apart from its own error for too many pixels."""
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag of an image, and its values for one whose height and width change places."""


def load_image(path: str) -> "Image.Image":
    """The image in a file, upright, in RGB. Raises `RowError` for a file that holds none."""
    require("PIL", "vision", "reading images")
    from transformers.image_utils import load_image as load

    _silence()
    with _explaining_damage(path):
        return load(path)


def decoded_size(path: str) -> Size:
    """The size of an upright image, whose file is decoded to its end: a cut one has a good header. Raises `RowError`.

    A JPEG is decoded in gray and at an eighth of its sides, which finds the same damage in a third of the time.
    """
    require("PIL", "vision", "reading images")
    from PIL import Image

    _silence()
    with _explaining_damage(path), Image.open(path) as image:
        if image.format == "JPEG":
            width, height = image.size
            is_turned = image.getexif().get(_ORIENTATION) in _TURNED
            image.draft("L", (1, 1))
            image.load()
            return (width, height) if is_turned else (height, width)
    whole = load_image(path)
    return whole.height, whole.width


@contextmanager
def _explaining_damage(path: str) -> Iterator[None]:
    """Turns what Pillow raises for a file into `RowError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        if not os.path.getsize(path):
            raise RowError(f"{path!r} is an empty file, not an image", repr(path))
        yield
    except RowError:
        raise
    except UnidentifiedImageError as fault:
        raise RowError(f"{path!r} is not an image of a known kind", repr(path)) from fault
    except Image.DecompressionBombError as fault:
        reason = str(fault).partition(",")[0]
        raise RowError(f"{path!r} has too many pixels to be decoded: {reason}", repr(path), reason) from fault
    except _FAULTS as fault:
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise RowError(f"{path!r} cannot be read as an image: {reason}", repr(path), reason) from fault


def size_of(path: str) -> Size:
    """The size of an upright image. The file is decoded the first time. Raises `RowError`."""
    height, width = _sizes().of(path)
    return int(height), int(width)


def former_size(path: str) -> Size | None:
    """The size that an image had when it was measured last, by this process or one before; None if it never was."""
    known = _sizes().known(path)
    return None if known is None else (int(known[0]), int(known[1]))


def state_of(path: str) -> State | None:
    """What tells whether a file has changed; None for a file that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Measures:
    """What `measure` says about files, remembered in `file`, a line for each. Threads and processes may share it."""

    def __init__(self, file: str, measure: Callable[[str], tuple[float, ...]]) -> None:
        self.file, self.measure = file, measure
        self._lock = threading.Lock()
        self._known: dict[str, tuple[State, tuple[float, ...]]] = {}
        try:
            with open(file, encoding="utf-8") as lines:
                for line in lines:
                    self._learn(line)
        except OSError:
            pass

    def of(self, path: str) -> tuple[float, ...]:
        state = state_of(path)
        remembered, measure = self._known.get(path, (None, ()))
        if state is not None and remembered == state:
            return measure
        measure = self.measure(path)
        if state is not None and state_of(path) == state:
            self._remember(path, state, measure)
        return measure

    def known(self, path: str) -> tuple[float, ...] | None:
        remembered = self._known.get(path)
        return None if remembered is None else remembered[1]

    def _learn(self, line: str) -> None:
        try:
            path, num_bytes, changed, *measure = json.loads(line)
            if measure:
                self._known[str(path)] = ((int(num_bytes), int(changed)), tuple(map(float, measure)))
        except (ValueError, TypeError):  # a line that a killed process left half written
            return

    def _remember(self, path: str, state: State, measure: tuple[float, ...]) -> None:
        with self._lock:
            self._known[path] = (state, measure)
            line = json.dumps([path, *state, *measure]) + "\n"
            try:
                try:
                    self._append(line)
                except FileNotFoundError:
                    os.makedirs(os.path.dirname(self.file), exist_ok=True)
                    self._append(line)
            except OSError:  # without a cache, each start measures again
                return

    def _append(self, line: str) -> None:
        with open(self.file, "ab", buffering=0) as file:  # in one call, so that the lines of processes do not mix
            file.write(line.encode())


_opening = threading.Lock()
"""`lru_cache` does not wait for a call that another thread has begun: each would get `Measures` of its own."""


def measures_in(name: str, measure: Callable[[str], tuple[float, ...]]) -> Measures:
    """Those in the file `name` in the folder of the cache, the same for all threads."""
    with _opening:
        return _measures(os.path.join(cache_root(), "media", name), measure)


@functools.lru_cache(maxsize=16)
def _measures(file: str, measure: Callable[[str], tuple[float, ...]]) -> Measures:
    return Measures(file, measure)


def _sizes() -> Measures:
    return measures_in(SIZES_FILE, decoded_size)


@functools.cache
def _silence() -> None:
    """Pillow's remarks on palettes, EXIF and many pixels: what matters of them is an error here."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
