"""Frames are those shown at their times, upright; each bad file is one line."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from luthier.core.errors import RowError
from tests.films import HEIGHT, WIDTH, counting, film, gray_of, write

av = pytest.importorskip("av")

from luthier.data.media.frames import frames_in, frames_of, measure_of  # noqa: E402


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "webm"])
def test_a_frame_has_its_number(tmp_path, ending):
    """Frame n is of brightness 5 n."""
    path = str(film(tmp_path / f"a.{ending}", range(0, 200, 5), rate=8))
    height, width, num_frames, fps, seconds = measure_of(path)
    assert (height, width, num_frames) == (48, 64, 40)
    assert (fps, seconds) == pytest.approx((8, 5), rel=1e-3)
    numbers = [0, 3, 17, 17, 39]
    assert gray_of(frames_of(path, numbers, fps)) == pytest.approx([5 * n for n in numbers], abs=4)


def test_far_frames_are_reached_by_a_jump(tmp_path, monkeypatch):
    """With a key picture every 10 frames, one frame of the end costs few decoded ones."""
    from luthier.data.media import frames

    path = str(film(tmp_path / "a.mp4", [n % 250 for n in range(400)], rate=25, gop=10))
    decoded = []
    monkeypatch.setattr(frames, "_upright", lambda frame, own=frames._upright: decoded.append(frame.pts) or own(frame))
    assert gray_of(frames_of(path, [1, 399], 25.0)) == pytest.approx([1, 149], abs=3)
    assert len(decoded) == 2


def test_an_hour_long_file(tmp_path, monkeypatch):
    """Sixteen frames of 3,600, a key picture every 10 frames: what is not used is neither decoded nor kept."""
    pictures = [np.full((HEIGHT, WIDTH, 3), n % 250, np.uint8) for n in range(250)]
    path = str(write(tmp_path / "a.mp4", [pictures[n % 250] for n in range(3600)], rate=1, gop=10))
    frames_of(str(film(tmp_path / "b.mp4", range(0, 200, 5))), [0, 39], 8.0)  # what every first file takes
    opened, before = counting(monkeypatch), memory_bytes()
    height, width, num_frames, fps, seconds = measure_of(path)
    assert (height, width, num_frames, fps, seconds) == (48, 64, 3600, 1.0, 3600.0)
    numbers = list(range(100, 3600, 225))
    assert gray_of(frames_of(path, numbers, fps)) == pytest.approx([n % 250 for n in numbers], abs=4)
    measuring, reading = (container.num_decoded for container in opened)
    assert measuring <= 2 and len(numbers) <= reading <= 10 * len(numbers)
    assert memory_bytes() - before < 3600 * HEIGHT * WIDTH * 3 / 2, "half of what all frames would take"


def memory_bytes() -> int:
    """That this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_variable_rate(tmp_path):
    """Pictures at 0, 1, 1.1, 1.2 and 4 s. Between them, the last one is shown."""
    ticks = [0, 1000, 1100, 1200, 4000]
    path = str(film(tmp_path / "a.mkv", [0, 50, 100, 150, 200], ticks=ticks))
    _, _, num_frames, fps, seconds = measure_of(path)
    assert num_frames == 5 and fps == pytest.approx(1) and seconds == pytest.approx(5)
    assert gray_of(frames_of(path, [0, 1, 2, 3, 4], fps)) == pytest.approx([0, 50, 150, 150, 200], abs=3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_phone_that_was_turned(tmp_path, degrees):
    """The display matrix says by how much the picture is to be turned, clockwise."""
    path = film(tmp_path / "a.mp4", [100] * 4, corner=True, turned=degrees)
    height, width, *_ = measure_of(str(path))
    assert (height, width) == ((48, 64) if degrees in (0, 180) else (64, 48))
    (frame,) = frames_of(str(path), [0], 8.0)
    corners = [frame[row, column].mean() > 180 for row, column in ((2, 2), (2, -3), (-3, -3), (-3, 2))]
    assert corners.index(True) == degrees // 90 and corners.count(True) == 1, "top left, then clockwise"


def test_one_frame(tmp_path):
    path = str(film(tmp_path / "a.mp4", [77], rate=8))
    assert measure_of(path) == (48, 64, 1, 8.0, 0.125)
    assert gray_of(frames_of(path, [0, 0], 8.0)) == pytest.approx([77, 77], abs=3)


def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path):
    path = film(tmp_path / "a.mkv", [77, 77])
    named = path.read_bytes()
    assert b"Lavf" in named, "the name of the program that wrote it"
    path.write_bytes(named.replace(b"Lavf", b"\xff\xfevf"))
    assert measure_of(str(path))[:3] == (48, 64, 2)


def test_a_list_of_frames(tmp_path):
    for number in range(3):
        Image.new("RGB", (30, 20), (number * 40,) * 3).save(tmp_path / f"{number}.png")
    file = tmp_path / "a.frames"
    file.write_text(json.dumps([str(tmp_path / f"{number}.png") for number in range(3)]))
    assert measure_of(str(file)) == (20, 30, 3, 0.0, 0.0)
    assert gray_of(frames_in(str(file))) == [0, 40, 80]
    Image.new("RGB", (30, 21)).save(tmp_path / "1.png")
    with pytest.raises(RowError, match=r"different sizes: '.*0\.png' 20x30, '.*1\.png' 21x30 pixels"):
        measure_of(str(file))


class TestBadFiles:
    def refused(self, path) -> str:
        with pytest.raises(RowError) as caught:
            measure_of(str(path))
        assert str(path) not in caught.value.kind, "the path is no part of the kind of reason"
        return str(caught.value).replace(repr(str(path)), "it")

    def test_no_video(self, tmp_path):
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video" * 100)
        assert self.refused(tmp_path / "empty.mp4") == "it is an empty file, not a video"
        assert self.refused(tmp_path / "text.mp4").startswith("it cannot be read as a video: Invalid data")

    def test_sound_alone(self, tmp_path):
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=16_000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16_000
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
        assert self.refused(tmp_path / "a.mp4") == "it has no frames: it holds sound or text alone"

    def test_a_cut_file_with_a_good_header(self, tmp_path):
        path = film(tmp_path / "a.mp4", range(0, 200, 2), rate=8, noisy=True, header_first=True)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        words = self.refused(path)
        assert words.startswith("it is cut: it holds ") and words.endswith(" of the 100 frames in its header"), words

    def test_no_frames(self, tmp_path):
        path = film(tmp_path / "a.mp4", [1, 2], header_first=True)
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"mdat") + 4])
        assert self.refused(path) == "it holds no frames"
