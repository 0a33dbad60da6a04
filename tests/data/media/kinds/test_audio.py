"""Sounds at the model's rate in one channel, as transformers reads them; each bad file is one line."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from luthier.core.errors import RowError
from luthier.data.media.kinds import media_kind
from tests.hearing_models import tone, wave_of

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from luthier.data.media.kinds.audio import load_audio, measure_of, num_resampled, window_of  # noqa: E402

KIND = media_kind("audio")


@pytest.fixture
def whisper():
    from transformers import WhisperFeatureExtractor

    return SimpleNamespace(feature_extractor=WhisperFeatureExtractor(chunk_length=2))


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_a_file_is_read_as_by_transformers(tmp_path, ending, rate):
    from transformers.audio_utils import load_audio as of_transformers

    path = str(tone(tmp_path / f"a.{ending}", seconds=0.7, rate=rate))
    wave = load_audio(path, 16_000)
    assert np.array_equal(wave, of_transformers(path, sampling_rate=16_000, backend="soundfile"))
    num_samples, own = measure_of(path)
    assert own == rate and len(wave) == num_resampled(num_samples, own, 16_000)


def test_channels_become_one(tmp_path):
    left, right = wave_of(0.5, 16_000, 200, 300), wave_of(0.5, 16_000, 400, 300)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    assert np.allclose(load_audio(str(tmp_path / "a.wav"), 16_000), (left + right) / 2, atol=1e-6)
    assert measure_of(str(tmp_path / "a.wav")) == (8_000, 16_000)


@pytest.mark.parametrize("rate", [16_000, 22_050, 48_000])
def test_only_the_window_is_read_and_it_is_that_of_the_whole(tmp_path, rate):
    path = str(tone(tmp_path / "a.wav", seconds=3, rate=rate))
    whole, first = load_audio(path, 16_000), load_audio(path, 16_000, 20_000)
    assert len(first) == 20_000 and np.allclose(first, whole[:20_000], atol=1e-6)


def test_what_the_window_of_the_model_leaves_out(tmp_path, whisper):
    long, short = tone(tmp_path / "a.wav", seconds=5), tone(tmp_path / "b.wav", seconds=2)
    assert window_of(whisper) == 32_000
    measures = [KIND.measured(str(path)) for path in (long, short)]
    assert [KIND.size(measure, whisper) for measure in measures] == [(32_000, 16_000)] * 2
    assert KIND.left(measures[0], whisper) == ("has 5 s of sound, and the model hears the first 2 s", "5 s")
    assert KIND.left(measures[1], whisper) == ("",)
    assert len(KIND.loaded(str(long), whisper)) == 32_000


def test_a_part_that_cuts_by_its_own_default():
    """Gemma 3n's: `max_length` samples of each file."""

    class Part:
        sampling_rate = 16_000

        def __call__(self, raw_speech, max_length: int | None = 480_000, truncation: bool = True):
            raise NotImplementedError

    class All(Part):
        def __call__(self, raw_speech, max_length: int | None = 480_000, truncation: bool = False):
            raise NotImplementedError

    assert window_of(SimpleNamespace(feature_extractor=Part())) == 480_000
    assert window_of(SimpleNamespace(feature_extractor=All())) is None


def damaged(folder, name):
    path = folder / name
    source = tone(folder / f"whole.{name.rpartition('.')[2]}", seconds=10)
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("name", "reason"), [("cut.wav", "is cut: it holds less"), ("cut.mp3", "is cut"), ("cut.flac", "cannot be read")]
)
def test_a_cut_file(tmp_path, name, reason):
    path = damaged(tmp_path, name)
    with pytest.raises(RowError, match=reason) as caught:
        measure_of(str(path))
    assert repr(str(path)) in str(caught.value) and str(path) not in caught.value.kind


def test_files_without_sound(tmp_path):
    for name in ("empty.wav", "empty.au"):  # the second one is opened
        (tmp_path / name).touch()
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, math.nan], np.float32), 16_000, subtype="FLOAT")
    reasons = {
        "empty.wav": "is an empty file, not audio",
        "empty.au": "is an empty file, not audio",
        "text.wav": "cannot be read as audio: Format not recognised",
        "none.wav": "holds no sound: it has 0 samples",
        "nan.wav": "holds samples that are not numbers",
        "absent.wav": "cannot be read as audio: ",
    }
    for name, reason in reasons.items():
        with pytest.raises(RowError, match=reason):
            measure_of(str(tmp_path / name))


def test_samples_in_the_data(tmp_path):
    wave = wave_of(0.5, 8_000, 200, 300)
    path = KIND.path_of({"array": wave.tolist(), "sampling_rate": 8_000, "path": None}, "item 1")
    assert path == KIND.path_of({"array": wave, "sampling_rate": 8_000}, "item 1"), "equal sounds are one file"
    assert np.array_equal(load_audio(path, 8_000), wave)
    for array in ([], "abc", [[[0.0]]]):
        with pytest.raises(RowError, match="item 1 is not audio with 'array' and 'sampling_rate'"):
            KIND.path_of({"array": array, "sampling_rate": 8_000}, "item 1")


def test_the_rate_is_that_of_the_model(tmp_path):
    path = str(tone(tmp_path / "a.wav", seconds=1, rate=16_000))
    part = SimpleNamespace(sampling_rate=8_000, n_samples=None)
    assert len(KIND.loaded(path, SimpleNamespace(feature_extractor=part))) == 8_000
