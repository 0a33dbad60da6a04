"""Videos drawn by tests."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

HEIGHT, WIDTH = 48, 64


def film(
    path: Path,
    grays: Iterable[int],
    *,
    rate: int = 8,
    ticks: Sequence[int] | None = None,
    gop: int = 12,
    corner: bool = False,
    turned: int = 0,
    noisy: bool = False,
    header_first: bool = False,
    wave: Any = None,
    wave_rate: int = 16_000,
) -> Path:
    """One frame of 48x64 pixels for each brightness. `ticks`: their times in ms. `corner`: the top left one is white.
    `turned`: degrees clockwise by which a player turns the picture. `header_first`: as on the web. `wave`: the sound,
    (N,) or (channels, N), which an mkv file keeps as it is."""
    import numpy as np

    pictures = []
    for number, gray in enumerate(grays):
        picture = np.full((HEIGHT, WIDTH, 3), gray, np.uint8)
        if corner:
            picture[:8, :8] = 255
        if noisy:
            picture[:] = np.random.default_rng(number).integers(0, 256, picture.shape, dtype=np.uint8)
        pictures.append(picture)
    return write(
        path, pictures, rate=rate, ticks=ticks, gop=gop, turned=turned, header_first=header_first, wave=wave,
        wave_rate=wave_rate,
    )  # fmt: skip


def write(
    path: Path,
    pictures: Sequence,
    *,
    rate: int = 8,
    ticks: Sequence[int] | None = None,
    gop: int = 12,
    turned: int = 0,
    header_first: bool = False,
    wave: Any = None,
    wave_rate: int = 16_000,
) -> Path:
    import av

    codec = {"webm": "libvpx"}.get(path.suffix[1:], "mpeg4" if path.suffix == ".avi" else "libx264")
    options = {"movflags": "+faststart"} if header_first else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = (pictures[0].shape[1], pictures[0].shape[0]) if len(pictures) else (WIDTH, HEIGHT)
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        packets = _sound(container, path, wave, wave_rate) if wave is not None else ()
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for packet in packets:
            container.mux(packet)
    if turned:
        _turn(path, turned)
    return path


def _sound(container: Any, path: Path, wave: Any, rate: int) -> Iterator[Any]:
    """The packets of a sound track, which is added at once."""
    import av
    import numpy as np

    channels = np.atleast_2d(np.asarray(wave, np.float32))
    layout = {1: "mono", 2: "stereo"}[len(channels)]
    stream = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=rate, layout=layout)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return (packet for part in (frame, None) for packet in stream.encode(part))


def _turn(path: Path, degrees: int) -> None:
    """Changes the display matrix in the track header of an mp4, as phones write it."""
    import struct

    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4
    at = start + 40  # of version 0: 20 bytes of times and numbers, 8 reserved, 8 of layer and volume, after 4 of flags
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))


class CountingContainer:
    """A file of PyAV that counts the frames, or the pieces of sound, that are decoded."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self.num_decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self._container.decode(stream):
            self.num_decoded += 1
            yield frame


def counting(monkeypatch: Any) -> list[CountingContainer]:
    """The files that are opened from now on."""
    from luthier.data.media import frames

    opened, own = [], frames.opened

    @contextmanager
    def counted(path: str) -> Iterator[Any]:
        with own(path) as container:
            opened.append(CountingContainer(container))
            yield opened[-1]

    monkeypatch.setattr(frames, "opened", counted)
    return opened


def gray_of(frames) -> list[float]:
    """The mean brightness of each frame."""
    return [float(frame.mean()) for frame in frames]
