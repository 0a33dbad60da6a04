"""The processor chooses frames, and gets them with their times."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from luthier.core.errors import RowError
from luthier.data.media.kinds import Loaded, arguments_for, examined, files_of, media_kind
from luthier.data.media.kinds.video import HEAD
from tests.films import film, gray_of
from tests.hearing_models import wave_of

pytest.importorskip("av")
KIND = media_kind("video")


class Part:
    """As the parts of transformers: it takes every n-th frame."""

    valid_kwargs = SimpleNamespace(__annotations__={"fps": float, "do_sample_frames": bool, "device": str})
    do_sample_frames = True

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def sample_frames(self, metadata, fps: float, **others):
        assert not others
        if metadata.total_num_frames < 4:
            raise ValueError("fewer than 4 frames")
        return np.arange(0, metadata.total_num_frames, round(metadata.fps / fps))


def processor(fps: float = 2.0, **more) -> SimpleNamespace:
    part = Part(fps)
    vars(part).update(more)
    return SimpleNamespace(video_processor=part)


def test_only_what_the_processor_chooses_is_decoded(tmp_path):
    path = str(film(tmp_path / "a.mp4", range(0, 200, 5), rate=8))
    size = KIND.size(KIND.measured(path), processor())
    assert size == (48, 64, 40, 8.0, 5.0, 0, *range(0, 40, 4))
    video = KIND.loaded(path, processor())
    assert gray_of(video.frames) == pytest.approx([20 * n for n in range(10)], abs=3)
    given = KIND.given([[video], [video]], processor())
    assert [len(one) for one in given["videos"]] == [10, 10]
    settings = given["videos_kwargs"]
    assert settings["do_sample_frames"] is False
    assert [one.timestamps for one in settings["video_metadata"]] == [[n / 2 for n in range(10)]] * 2
    assert settings["video_metadata"][0].duration == 5.0 and settings["video_metadata"][0].total_num_frames == 40


def test_the_limits_of_the_run_decide(tmp_path):
    measure = KIND.measured(str(film(tmp_path / "a.mp4", range(40), rate=8)))
    assert len(KIND.size(measure, processor(4.0))) - HEAD == 20
    handed = processor(4.0)
    handed.videos_kwargs = {"fps": 1.0}
    assert len(KIND.size(measure, handed)) - HEAD == 5, "the class may hand its part another value"


def test_black_frames_have_the_size_of_the_video(tmp_path):
    size = KIND.size(KIND.measured(str(film(tmp_path / "a.mp4", range(40), rate=8))), processor())
    assert tuple(KIND.blank(size, processor()).frames.shape) == (10, 3, 48, 64)
    assert KIND.shown(size) == "48x64, 5 s, 10 of 40 frames" and KIND.shown(size[:5]) == "48x64, 5 s"


@pytest.fixture
def listening() -> SimpleNamespace:
    """A processor that hears the first two seconds of videos."""
    part = SimpleNamespace(sampling_rate=16_000, n_samples=32_000)
    found = processor()
    vars(found).update(load_audio_from_video=True, feature_extractor=part)
    return found


def test_the_sound_of_a_video_is_part_of_its_size_and_is_given_in_the_order_of_the_text(tmp_path, listening):
    path = str(film(tmp_path / "a.mkv", range(40), rate=8, wave=wave_of(1.5, 8_000, 300, 600), wave_rate=8_000))
    item = KIND.item(path)
    assert examined(item, listening).measure[5:] == (12_000, 8_000) and len(examined(item, processor()).measure) == 5
    size = examined(item, listening).shape.size
    assert size[HEAD - 1] == 24_000 and examined(item, processor()).shape.size[HEAD - 1] == 0
    video, blank = KIND.loaded(path, listening), KIND.blank(size, listening)
    assert video.sound.shape == blank.sound.shape == KIND.noise(size, listening).sound.shape == (24_000,)
    assert abs(video.sound).max() > 0.4 and not blank.sound.any() and KIND.loaded(path, processor()).sound is None
    wave = np.ones(5)
    samples = [[Loaded("audio", wave), Loaded("video", video)], [Loaded("video", blank), Loaded("audio", wave)]]
    given = arguments_for(samples, listening)
    assert given["load_audio_from_video"] is True and given["audio_from_video_indices"] == [None, 0, 1, None]
    assert [len(one) for one in given["audio"]] == [5, 24_000, 24_000, 5]
    assert arguments_for([[Loaded("audio", wave)]], listening)["load_audio_from_video"] is False


def test_the_window_of_the_model_holds_for_the_sound_of_a_video_too(tmp_path, listening):
    path = str(film(tmp_path / "a.mkv", range(40), rate=8, wave=wave_of(3, 16_000, 300, 600)))
    item = KIND.item(path)
    assert examined(item, listening).shape.size[HEAD - 1] == 32_000 == len(KIND.loaded(path, listening).sound)
    assert KIND.left(examined(item, listening).measure, listening)[0].startswith(
        "has 3 s of sound, and the model hears the"
    )
    assert KIND.left(examined(item, processor()).measure, processor()) == ("",)


def test_a_video_too_short_for_the_processor_is_named(tmp_path):
    path = str(film(tmp_path / "a.mp4", [1, 2], rate=8))
    with pytest.raises(
        RowError, match=r"a\.mp4': the processor of this model cannot choose frames of it: fewer than 4"
    ):
        examined(KIND.item(path), processor())


def test_a_processor_of_all_frames_takes_no_long_video():
    whole = processor(do_sample_frames=False)
    assert KIND.size((48, 64, 3, 8.0, 0.375), whole)[HEAD:] == (0, 1, 2)
    with pytest.raises(RowError, match=r"takes all 2,000 frames -> give video_fps"):
        KIND.size((48, 64, 2000, 8.0, 250.0), whole)


def test_a_list_of_frames_is_taken_whole_and_every_file_counts(tmp_path):
    from tests.media_models import draw

    names = [draw(tmp_path / f"{number}.png", height=20, width=30).name for number in range(3)]
    path = KIND.path_of(names, "item 1")
    path = KIND.in_folder(path, str(tmp_path))
    item = KIND.item(path)
    assert files_of(item) == (path, *(str(tmp_path / name) for name in names))
    assert examined(item, processor()).shape.size == (20, 30, 3, 2.0, 1.5, 0, 0, 1, 2)
    assert KIND.loaded(path, processor()).frames.shape == (3, 20, 30, 3)
    draw(tmp_path / names[2], height=22, width=30)
    with pytest.raises(RowError, match="different sizes"):
        examined(item, processor())
    with pytest.raises(RowError, match="item 1 is a list without frames"):
        KIND.path_of([], "item 1")
    with pytest.raises(RowError, match="frame 2 of item 1 is of type int"):
        KIND.path_of(["a.png", 5], "item 1")
    assert json.loads((tmp_path / path).read_text())


def test_a_damaged_picture_is_found_before_training(tmp_path):
    """The packets say nothing about it; the chosen frames are decoded once."""
    path = film(tmp_path / "a.mp4", range(0, 200, 5), rate=8, noisy=True, gop=1)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 8
    content[start : start + 60_000] = b"\0" * 60_000
    path.write_bytes(bytes(content))
    with pytest.raises(RowError, match=r"a\.mp4'"):
        examined(KIND.item(str(path)), processor())
