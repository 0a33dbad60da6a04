"""Limits of a run on the parts of processors: how many patches a picture becomes, worked out by hand."""

import json

import numpy as np
import pytest
from transformers import AutoProcessor

from luthier.core.errors import MissingExtra, ModelError
from luthier.core.versions import is_installed
from luthier.model.files.sources import ModelSource
from luthier.model.media.limits import set_limits
from luthier.model.media.processor import load_processor
from tests.model.media.processors import ROLES, areas, as_two_files, fixed, picture, save_processor
from tests.tiny import byte_tokenizer

UNREAD = "has no effect: nothing in the processor of this model"


def grid(processor, height, width):
    """Rows and columns of patches of a picture, as its height and width in patches."""
    return processor.image_processor(picture(height, width))["image_grid_thw"][0][1:].tolist()


def test_a_picture_above_the_limit_is_scaled_down(tmp_path):
    """560 by 1120 pixels are 627,200; a limit of a quarter of that halves each side: 280 by 560 is 20 by 40 patches."""
    folder = areas(tmp_path)
    assert grid(AutoProcessor.from_pretrained(folder), 560, 1120) == [40, 80]
    assert grid(load_processor(ModelSource(str(folder)), {"image_max_pixels": 156_800})[0], 560, 1120) == [20, 40]


def test_a_picture_below_the_limit_is_scaled_up(tmp_path):
    """56 by 56 pixels are 3,136; a limit of four times that doubles each side: 112 by 112 is 8 by 8 patches."""
    folder = areas(tmp_path)
    assert grid(AutoProcessor.from_pretrained(folder), 56, 56) == [28, 28]  # 384 * 384 pixels at least: 14 * 28 a side
    processor, _ = load_processor(ModelSource(str(folder)), {"image_min_pixels": 12_544})
    assert grid(processor, 56, 56) == [8, 8]
    assert processor.image_processor.size.longest_edge == 1536 * 1536  # not given, so the model's own


def test_no_limits_change_nothing(tmp_path, said):
    folder = areas(tmp_path)
    processor, changes = load_processor(ModelSource(str(folder)), {})
    assert processor.to_dict() == AutoProcessor.from_pretrained(folder).to_dict()
    assert not changes and not said


def test_a_limit_that_contradicts_the_model_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match="147,456 pixels as its least and would have 1,000 as its most -> give image_min"
    ):
        load_processor(ModelSource(str(areas(tmp_path))), {"image_max_pixels": 1000})
    load_processor(ModelSource(str(tmp_path)), {"image_max_pixels": 1000, "image_min_pixels": 784})
    with pytest.raises(ModelError, match=r"^image_min_pixels.* -> give image_max_pixels too"):
        load_processor(ModelSource(str(tmp_path)), {"image_min_pixels": 10_000_000})


def test_where_a_picture_counts_as_two_frames_the_limit_is_still_of_the_picture(tmp_path):
    from transformers import Glm4vImageProcessorPil

    folder = save_processor(tmp_path, "PaddleOCRVLProcessor", image_processor=Glm4vImageProcessorPil())
    processor = load_processor(ModelSource(str(folder)), {"image_max_pixels": 156_800})[0]
    assert processor.image_processor.size["longest_edge"] == 2 * 156_800
    assert grid(processor, 560, 1120) == [20, 40]


def test_an_edge_is_no_area(tmp_path, said):
    from transformers import DetrImageProcessorPil

    folder = save_processor(tmp_path, "LlavaProcessor", image_processor=DetrImageProcessorPil())
    _, changes = load_processor(ModelSource(str(folder)), {"image_max_pixels": 156_800})
    assert not changes
    assert [line for line in said if UNREAD in line and line.startswith("warning: image_max_pixels")]


def test_a_key_that_nothing_reads_is_named(tmp_path, said):
    limits = {"image_max_pixels": 589_824, "video_fps": 1.0, "video_maxlen": 8, "audio_sampling_rate": 16_000}
    limits |= {"use_audio_in_video": True, "crop_to_patches": False, "image_do_pan_and_scan": True}
    _, changes = load_processor(ModelSource(str(fixed(tmp_path))), limits)
    assert [line.split(":")[1].strip() for line in said] == [key for key in limits if key != "crop_to_patches"]
    assert all(UNREAD in line and "LlavaProcessor" in line for line in said) and not changes


def test_the_tokenizer_of_a_model_of_text_reads_no_limit(llama_folder):
    outcome = set_limits(AutoProcessor.from_pretrained(llama_folder), {"image_max_pixels": 1})
    assert not outcome.read and not outcome.changes


def test_pan_and_scan_adds_pieces_of_a_long_picture(tmp_path, said):
    """Twice as wide as high: two pieces side by side, and the whole."""
    from transformers import Gemma3ImageProcessorPil

    folder = save_processor(tmp_path, "Gemma3Processor", image_processor=Gemma3ImageProcessorPil(), image_seq_length=4)

    def num_pictures(processor):
        return len(processor(text="<boi>", images=picture(560, 1120))["pixel_values"])

    assert num_pictures(AutoProcessor.from_pretrained(folder)) == 1
    processor, changes = load_processor(ModelSource(str(folder)), {"image_do_pan_and_scan": True})
    assert num_pictures(processor) == 3
    assert [line for line in said if "image_do_pan_and_scan: Gemma3Processor of transformers sets it again" in line]
    assert changes == {"image_processor": {"do_pan_and_scan": True}}
    assert num_pictures(AutoProcessor.from_pretrained(folder)) == 1, "the class is left as it was"


def test_crop_to_patches_cuts_tiles(tmp_path):
    """Three tiles of 384 by 384 pixels beside each other, and the small picture of the whole."""
    from transformers import GotOcr2ImageProcessorPil

    folder = save_processor(tmp_path, "GotOcr2Processor", image_processor=GotOcr2ImageProcessorPil())
    for wish, num_tiles in ((True, 4), (False, 1)):
        processor = load_processor(ModelSource(str(folder)), {"crop_to_patches": wish})[0]
        assert len(processor.image_processor(picture(384, 1152))["pixel_values"]) == num_tiles
        assert processor.images_kwargs["crop_to_patches"] is wish


def test_another_sampling_rate_makes_the_filters_anew(tmp_path, said):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=8)
    folder = save_processor(tmp_path, "Qwen2AudioProcessor", feature_extractor=extractor)
    made = load_processor(ModelSource(str(folder)), {"audio_sampling_rate": 8000})[0].feature_extractor
    expected = WhisperFeatureExtractor(feature_size=8, sampling_rate=8000)
    assert np.array_equal(made.mel_filters, expected.mel_filters)
    assert not np.array_equal(made.mel_filters, extractor.mel_filters)
    assert made.to_dict() == expected.to_dict() and made.n_samples == 30 * 8000
    assert any("trained on audio of 16,000 samples a second, not 8,000" in line for line in said)
    assert not load_processor(ModelSource(str(folder)), {"audio_sampling_rate": 16_000})[1]


@pytest.mark.skipif(is_installed("torchvision"), reason="it is installed")
def test_a_library_that_the_processor_lacks_is_one_sentence(tmp_path):
    folder = areas(tmp_path)
    as_two_files(folder)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    content |= {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(MissingExtra, match=r"its processor needs the library `torchvision`.*luthier\[vision\]"):
        load_processor(ModelSource(str(folder)), {"image_max_pixels": 156_800})


# -- with torchvision, which has what films need ---------------------------------------------------


@pytest.fixture
def qwen(tmp_path):
    """Name of a model's kind -> the folder of its processor."""
    pytest.importorskip("torchvision")
    import transformers

    def save(kind):
        video_processor = getattr(transformers, f"{kind}VideoProcessor")()
        patch_size = video_processor.patch_size
        image_processor = transformers.Qwen2VLImageProcessor(patch_size=patch_size)
        parts = {"image_processor": image_processor, "video_processor": video_processor}
        return str(save_processor(tmp_path, f"{kind}Processor", **parts))

    return save


def film(processor, num_frames, side, **options):
    """Steps, rows and columns of patches of a square film."""
    frames = np.zeros((num_frames, 3, side, side), dtype=np.uint8)
    return processor.video_processor([frames], **options)["video_grid_thw"][0].tolist()


def test_pictures_and_films_of_qwen2_vl(qwen, said):
    """A frame of 224 by 224 pixels has 16 by 16 patches; a quarter of its area leaves 8 by 8. Two frames are one step.

    A film of 8 seconds, 4 frames each, has 16 frames at 2 frames a second, of which 10 are left.
    """
    folder = qwen("Qwen2VL")
    limits = {"video_max_pixels": 12_544, "video_min_pixels": 784, "image_max_pixels": 156_800}
    processor = load_processor(ModelSource(folder), limits)[0]
    assert grid(processor, 560, 1120) == [20, 40]
    assert film(processor, 8, 224) == [4, 8, 8] and film(processor, 2, 224) == [1, 8, 8]
    metadata = {"fps": 4, "total_num_frames": 32, "duration": 8}
    processor = load_processor(ModelSource(folder), {**limits, "video_fps": 2.0})[0]
    assert film(processor, 32, 224, video_metadata=[metadata])[0] == 8
    processor = load_processor(ModelSource(folder), {**limits, "video_fps": 2.0, "video_maxlen": 10})[0]
    assert film(processor, 32, 224, video_metadata=[metadata]) == [5, 8, 8]
    assert not said
    load_processor(ModelSource(folder), {"video_maxlen": 10})
    assert said == ["video_maxlen: this processor takes all frames of a video unless video_fps is given"]


def test_films_of_qwen3_vl_have_one_limit_for_all_frames(qwen, said):
    """A frame of 256 by 256 pixels has 16 by 16 patches; 8 frames of a quarter of the area leave 8 by 8."""
    limits = {"video_max_pixels": 16_384, "video_min_pixels": 1024, "video_maxlen": 8}
    processor = load_processor(ModelSource(qwen("Qwen3VL")), limits)[0]
    assert processor.video_processor.size["longest_edge"] == 8 * 16_384
    assert processor.video_processor.size["shortest_edge"] == 4 * 1024
    assert film(processor, 8, 256, do_sample_frames=False) == [4, 8, 8]
    assert any("whole videos, so 16,384 pixels times 8 frames" in line for line in said)


def test_tiles_of_internvl(tmp_path, said):
    pytest.importorskip("torchvision")
    from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor

    parts = {"image_processor": GotOcr2ImageProcessor(), "video_processor": InternVLVideoProcessor()}
    folder = str(save_processor(tmp_path, "InternVLProcessor", image_seq_length=4, **parts))
    for limits, num_tiles in (({}, 4), ({"crop_to_patches": True}, 4), ({"crop_to_patches": False}, 1)):
        processor = load_processor(ModelSource(folder), limits)[0]
        assert len(processor(text="<context>", images=picture(384, 1152))["pixel_values"]) == num_tiles
    assert len(said) == 1 and "InternVLProcessor of transformers sets it again with each call" in said[0]


def test_sound_in_films_of_qwen_omni():
    pytest.importorskip("torchvision")
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = byte_tokenizer(extra_special_tokens=ROLES | {"vision_bos_token": "<v>", "vision_eos_token": "</v>"})
    sound = WhisperFeatureExtractor(feature_size=8)
    processor = Qwen2_5OmniProcessor(Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), sound, tokenizer)
    outcome = set_limits(processor, {"use_audio_in_video": True, "video_max_pixels": 200_704})
    assert processor.load_audio_from_video and outcome.read == outcome.unsaved == {
        "use_audio_in_video",
        "video_max_pixels",
    }
    assert processor.videos_kwargs["size"]["longest_edge"] == 200_704
    assert not type(processor).load_audio_from_video
