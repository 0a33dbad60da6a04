"""Images are upright and in RGB, whatever their file is like, and measured once."""

import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from luthier.core.errors import RowError
from luthier.data.media import reader
from luthier.data.media.reader import Measures, decoded_size, former_size, load_image, size_of, state_of
from tests.media_models import draw


def sizes(file) -> Measures:
    return Measures(str(file), decoded_size)


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(tmp_path, mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)) if mode == "I;16" else noise.convert(mode)
    path = tmp_path / f"a.{'tiff' if mode in ('CMYK', 'F') else 'png'}"
    image.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(str(path))
    assert (loaded.mode, loaded.size) == ("RGB", (30, 20))
    assert size_of(str(path)) == (20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    assert size_of(str(tmp_path / "a.jpg")) == ((20, 30) if orientation < 5 else (30, 20))


def test_the_first_image_of_a_film(tmp_path):
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(str(tmp_path / "a.gif")).getpixel((0, 0)) == (255, 0, 0)


def test_a_cut_jpeg_has_a_good_header(tmp_path):
    draw(tmp_path / "a.jpg", height=100, width=100)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    assert Image.open(tmp_path / "a.jpg").size == (100, 100)
    with pytest.raises(RowError, match=r"a\.jpg' cannot be read as an image: image file is truncated"):
        size_of(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_measured_as_it_is_loaded(tmp_path, mode, progressive):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (201, 99, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / "a.jpg"
    noise.save(path, progressive=progressive)
    assert decoded_size(str(path)) == load_image(str(path)).size[::-1] == (201, 99)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        for read in (decoded_size, load_image):
            with pytest.raises(RowError, match="cannot be read as an image"):
                read(str(path))


def test_the_former_size_of_a_file_that_was_replaced(tmp_path):
    path = str(draw(tmp_path / "a.png"))
    assert former_size(path) is None
    size_of(path)
    draw(tmp_path / "a.png", height=40)
    assert former_size(path) == (28, 28)


def test_a_size_is_remembered_until_the_file_changes(tmp_path):
    path, file = draw(tmp_path / "a.png"), tmp_path / "memo" / "sizes.jsonl"
    assert sizes(file).of(str(path)) == (28, 28)
    state = state_of(str(path))
    path.write_bytes(b"x" * state[0])
    os.utime(path, ns=(0, state[1]))
    assert sizes(file).of(str(path)) == (28, 28), "an unchanged file is not opened"
    draw(path, height=40)
    assert sizes(file).of(str(path)) == (40, 28)


def test_all_threads_get_the_same_measures(monkeypatch):
    def slowly(file, measure):
        time.sleep(0.02)  # the others ask before the first one has read the file
        return Measures(file, measure)

    monkeypatch.setattr(reader, "Measures", slowly)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: reader.measures_in("slow.jsonl", decoded_size), range(8)))
    assert len(set(map(id, found))) == 1, "else what one measures is not known to the others"


def test_a_half_written_line_is_left_out(tmp_path):
    path, file = draw(tmp_path / "a.png"), tmp_path / "sizes.jsonl"
    file.write_text('["/a.png", 1, 2\n' + json.dumps([str(path), *state_of(str(path)), 7, 8]) + "\n[1]\n")
    assert sizes(file).of(str(path)) == (7, 8)


def test_without_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert sizes(tmp_path / "file" / "sizes.jsonl").of(str(draw(tmp_path / "a.png"))) == (28, 28)


def test_a_file_that_is_not_there_has_no_state(tmp_path):
    assert state_of(str(tmp_path / "no")) is None
