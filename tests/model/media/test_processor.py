"""What prepares pictures stays with the weights: in checkpoints, adapters and exports."""

import json

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError
from luthier.model.files.hubs import HubAccess
from luthier.model.files.sources import ModelSource
from luthier.model.loading.merged import load_for_export
from luthier.model.media.processor import (
    PROCESSOR_FILES,
    copy_processor,
    fit_processor,
    processor_class,
    reads_text_only,
)
from luthier.model.save import write_model
from luthier.run import check
from luthier.workflow.export import export
from luthier.workflow.training import train
from tests.hub_cache import put_into_cache
from tests.model.media.processors import areas, as_two_files, media_tokenizer
from tests.model.test_multimodal import CLIP, LLAMA
from tests.tiny import byte_tokenizer

SETTINGS = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "size": 32}


@pytest.fixture
def llava_folder(tmp_path):
    config = AutoConfig.for_model("llava", text_config=LLAMA, vision_config=CLIP)
    folder = tmp_path / "llava"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture
def areas_folder(llava_folder):
    """A model with a processor that limits the area of pictures."""
    (llava_folder / "preprocessor_config.json").unlink()
    return areas(llava_folder)


def world(model, tmp_path, **more):
    """The keys of a short run on text."""
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    keys = {"model_name_or_path": str(model), "dataset": "rows", "dataset_dir": str(tmp_path), "do_train": True}
    keys |= {"output_dir": str(tmp_path / "out"), "template": "default", "max_steps": 2, "save_steps": 2}
    return {**keys, "report_to": "none", **more}


def area_in(folder):
    """Least and most pixels, as plain transformers reads them from a saved folder."""
    size = AutoProcessor.from_pretrained(folder).image_processor.size
    return size.shortest_edge, size.longest_edge


def test_the_class_is_read_without_loading_it(areas_folder, tmp_path):
    assert processor_class(ModelSource(str(areas_folder))) == "PaddleOCRVLProcessor"
    assert processor_class(ModelSource(str(tmp_path))) is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_on_text_trains_the_language_model_and_keeps_the_processor(llava_folder, tmp_path, kind):
    out = tmp_path / "out"
    train(load_train(world(llava_folder, tmp_path, finetuning_type=kind)))
    for folder in (out, out / "checkpoint-2"):
        assert json.loads((folder / "preprocessor_config.json").read_text()) == SETTINGS
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["computed_with"] == {"attention": "sdpa", "dtype": "float32"}


def test_an_export_has_it_too(llava_folder, tmp_path):
    keys = {"model_name_or_path": str(llava_folder), "export_dir": str(tmp_path / "merged")}
    write_model(tmp_path / "merged", load_for_export(load_export(keys)), byte_tokenizer())
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text()) == SETTINGS


def test_a_model_of_text_has_none_and_a_missing_one_is_said(llama_folder, llava_folder, tmp_path, said):
    from transformers import AutoModelForCausalLM

    copy_processor(AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path)
    assert not said
    (llava_folder / "preprocessor_config.json").unlink()
    copy_processor(AutoModelForImageTextToText.from_pretrained(llava_folder), tmp_path)
    assert any("has no files of a processor" in line for line in said)
    assert not [name for name in PROCESSOR_FILES if (tmp_path / name).exists()]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("is_former", [False, True])
def test_limits_are_saved_for_plain_transformers(areas_folder, tmp_path, kind, is_former):
    """In the layout of transformers 5, and in the files of earlier versions if the model has them."""
    if is_former:
        as_two_files(areas_folder)
    own = area_in(areas_folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "video_preprocessor_config.json").write_text("{}")  # of an earlier run with another model
    limits = {"image_max_pixels": 156_800, "image_min_pixels": 784}
    train(load_train(world(areas_folder, tmp_path, finetuning_type=kind, overwrite_output_dir=True, **limits)))
    for folder in (out, out / "checkpoint-2"):
        assert area_in(folder) == (784, 156_800)
        assert (folder / "preprocessor_config.json").is_file() == is_former
        assert not (folder / "video_preprocessor_config.json").exists()
        if is_former:
            content = json.loads((folder / "preprocessor_config.json").read_text())
            assert content["size"] == {"shortest_edge": 784, "longest_edge": 156_800}
            assert (content["min_pixels"], content["max_pixels"]) == (784, 156_800)
    assert area_in(areas_folder) == own, "the model's own folder is left as it was"


def test_without_limits_every_file_is_the_same(areas_folder, tmp_path):
    train(load_train(world(areas_folder, tmp_path)))
    for name in PROCESSOR_FILES:
        ours, own = tmp_path / "out" / name, areas_folder / name
        assert ours.exists() == own.exists() and (not own.exists() or ours.read_bytes() == own.read_bytes())


def test_an_export_has_the_limits_of_its_run_or_else_those_its_adapter_was_trained_with(areas_folder, tmp_path):
    train(load_train(world(areas_folder, tmp_path, finetuning_type="lora", image_max_pixels=156_800)))
    keys = {"model_name_or_path": str(areas_folder), "adapter_name_or_path": str(tmp_path / "out")}
    keys |= {"template": "default", "export_check": False}
    for limits, most in (({}, 156_800), ({"image_max_pixels": 313_600}, 313_600)):
        folder = tmp_path / str(most)
        export(load_export({**keys, **limits, "export_dir": str(folder)}))
        assert area_in(folder) == (384 * 384, most)


def test_films_get_a_file_of_their_own_where_pictures_alone_are_limited(llava_folder, tmp_path):
    """Qwen2-VL came with one file for both; the limit of pictures must not become that of films."""
    pytest.importorskip("torchvision")
    media_tokenizer().save_pretrained(llava_folder)
    settings = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    settings |= {"min_pixels": 3136, "max_pixels": 12_845_056}
    (llava_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "saved").mkdir()
    fitted = fit_processor(load_train(world(llava_folder, tmp_path, image_max_pixels=156_800)))
    copy_processor(AutoModelForImageTextToText.from_pretrained(llava_folder), tmp_path / "saved", fitted)
    media_tokenizer().save_pretrained(tmp_path / "saved")
    for is_former in (False, True):
        if is_former:
            (tmp_path / "saved" / "processor_config.json").unlink()
        saved = AutoProcessor.from_pretrained(tmp_path / "saved")
        assert saved.image_processor.size.longest_edge == 156_800
        assert saved.video_processor.size.longest_edge == 12_845_056


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"image_max_pixels": 100, "image_min_pixels": 200}, "image_max_pixels: 100: must not be below image_min"),
        ({"video_max_pixels": 100, "video_min_pixels": 200}, "video_max_pixels: 100: must not be below video_min"),
        ({"image_min_pixels": 0}, "image_min_pixels: 0: must be at least 1"),
        ({"video_fps": 0}, r"video_fps: 0.*: must be above 0"),
        ({"video_maxlen": 0}, "video_maxlen: 0: must be at least 1"),
        ({"audio_sampling_rate": -1}, "audio_sampling_rate: -1: must be at least 1"),
    ],
)
def test_limits_that_cannot_be_are_refused_at_once(tmp_path, keys, words):
    for load, more in ((load_train, world("m", tmp_path)), (load_infer, {}), (load_export, {"export_dir": "e"})):
        with pytest.raises(ConfigError, match=words):
            load({"model_name_or_path": "m", **more, **keys})


def test_a_limit_below_a_default_that_nobody_gave_is_fine(tmp_path):
    assert not load_train(world("m", tmp_path, image_max_pixels=500)).warnings


def test_check_tells_that_a_model_reads_text_only(llama_folder, areas_folder, tmp_path, capsys):
    for model, expected in ((llama_folder, 1), (areas_folder, 0)):
        words = [f"{key}={value}" for key, value in world(model, tmp_path, image_max_pixels=156_800).items()]
        assert check.main([*words, "video_fps=2.0"]) == 0  # a default asks for nothing
        assert (
            capsys.readouterr().out.count("image_max_pixels: '156800': has no effect: this model reads text")
            == expected
        )


def test_a_model_reads_text_only_if_neither_its_config_nor_its_files_say_otherwise(llama_folder, tmp_path):
    assert reads_text_only(ModelSource(str(llama_folder))) and not reads_text_only(ModelSource(str(tmp_path / "none")))
    assert not reads_text_only(ModelSource("somebody/model-on-a-hub"))
    put_into_cache(llama_folder, "somebody/llama", tmp_path)
    assert reads_text_only(ModelSource("somebody/llama", HubAccess(cache_dir=str(tmp_path))))
    config = tmp_path / "config.json"
    for content, expected in (
        ({"model_type": "llama", "video_token_id": 3, "rope_parameters": {"rope_theta": 1e4}}, True),
        ({"model_type": "a", "vision_config": {}}, False),
        ({"model_type": "a", "thinker_config": {"audio_config": {}}}, False),
        ({"model_type": "a", "auto_map": {}}, False),
    ):
        config.write_text(json.dumps(content))
        assert reads_text_only(ModelSource(str(tmp_path))) is expected
    config.write_text(json.dumps({"model_type": "fuyu"}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert not reads_text_only(ModelSource(str(tmp_path)))


def test_a_run_on_a_model_of_text_goes_on_without(llama_folder, tmp_path, said):
    train(load_train(world(llama_folder, tmp_path, image_max_pixels=156_800)))
    assert any(line.startswith("warning: image_max_pixels: has no effect: this model reads text only") for line in said)
    assert not [name for name in PROCESSOR_FILES if (tmp_path / "out" / name).exists()]
