"""The sound of videos: in one channel at the rate of the model, and as long as it was measured."""

import math

import numpy as np
import pytest

from luthier.core.errors import RowError
from tests.films import counting, film
from tests.hearing_models import wave_of

pytest.importorskip("av")

from luthier.data.media.soundtrack import load_sound, measure_of

GRAYS = range(0, 80, 10)


def test_a_sound_at_the_rate_of_the_model_is_read_as_it_is(tmp_path):
    wave = np.round(wave_of(0.7, 16_000, 300, 600) * 2**15) / 2**15
    path = str(film(tmp_path / "a.mkv", GRAYS, wave=wave))
    assert measure_of(path) == (11_200, 16_000)
    assert np.array_equal(load_sound(path, 16_000, 11_200), wave.astype(np.float32))
    assert np.array_equal(load_sound(path, 16_000, 4_000), wave[:4_000].astype(np.float32))


@pytest.mark.parametrize(("ending", "rate"), [("mkv", 8_000), ("mkv", 44_100), ("mp4", 16_000), ("mp4", 48_000)])
def test_a_sound_is_resampled_and_as_long_as_measured(tmp_path, ending, rate):
    wave = wave_of(1.5, rate, 300, 600)
    path = str(film(tmp_path / f"a.{ending}", GRAYS, wave=wave, wave_rate=rate))
    num_samples, own = measure_of(path)
    assert own == rate and 0 <= num_samples - len(wave) <= 2048  # the encoder of mp4 fills its last frame
    num_wanted = math.ceil(num_samples * 16_000 / rate)
    found = load_sound(path, 16_000, num_wanted)
    assert found.shape == (num_wanted,) and found.dtype == np.float32
    expected = wave_of(1.5, 16_000, 300, 600)
    assert np.corrcoef(found[: len(expected)], expected)[0, 1] > 0.99, "neither shifted nor slower"
    assert np.array_equal(load_sound(path, 16_000, 8_000), found[:8_000]), "the first half is that of the whole"


def test_channels_have_the_same_weight(tmp_path):
    left, right = wave_of(0.5, 16_000, 200, 300), wave_of(0.5, 16_000, 400, 300)
    path = str(film(tmp_path / "a.mkv", GRAYS, wave=np.stack([left, right])))
    assert measure_of(path) == (8_000, 16_000)
    assert np.allclose(load_sound(path, 16_000, 8_000), (left + right) / 2, atol=1e-4)


def test_only_the_beginning_is_decoded(tmp_path, monkeypatch):
    path = str(film(tmp_path / "a.mp4", GRAYS, wave=wave_of(20, 16_000, 300, 310)))
    opened = counting(monkeypatch)
    assert len(load_sound(path, 16_000, 16_000)) == 16_000
    measure_of(path)
    first, whole = (container.num_decoded for container in opened)
    assert whole >= 20 * 16_000 / 1024 and first < whole / 10


def test_what_has_no_sound_is_named(tmp_path):
    silent = str(film(tmp_path / "a.mp4", GRAYS))
    with pytest.raises(RowError, match=r"a\.mp4' has no sound track, which use_audio_in_video needs"):
        measure_of(silent)
    with pytest.raises(RowError, match=r"a\.frames' is a list of frames, without the sound"):
        measure_of(str(tmp_path / "a.frames"))
    (tmp_path / "b.mp4").write_text("words")
    with pytest.raises(RowError, match=r"b\.mp4' cannot be read as a video"):
        measure_of(str(tmp_path / "b.mp4"))
