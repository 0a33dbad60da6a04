"""When a batch without images gets one, and which models may share batches with images."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from luthier.core.errors import ModelError
from luthier.data.media.blocks import MediaProcessor
from luthier.training.parts import layout_of
from luthier.workflow.seeing import pixels_for, require_same_eyes, shared_by_rows, training_pixels, trial_of
from tests.media_models import tiny_llava, tiny_llava_next


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("llava"))
    text = SimpleNamespace(media=MediaProcessor(AutoProcessor.from_pretrained(folder)))
    return AutoModelForImageTextToText.from_pretrained(folder), text


def processes(number: int, **more):
    return SimpleNamespace(**{"world_size": number, "fsdp": [], "deepspeed_plugin": None, **more})


def test_an_image_stands_in_only_where_several_processes_need_the_weights_that_see(llava):
    model, text = llava

    def stands_in(args):
        return training_pixels(model, text, args).stands_in

    assert stands_in(processes(2)) and not stands_in(processes(1))
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    assert not stands_in(processes(2))
    assert stands_in(processes(2, fsdp=["full_shard"])) and stands_in(processes(2, deepspeed_plugin=object()))
    model.requires_grad_(True)


def test_a_run_of_text_has_no_pixels(llava):
    blind = SimpleNamespace(media=None)
    assert pixels_for(llava[0], blind) is None and trial_of(blind) is None
    require_same_eyes("teacher model", llava[0], llava[0], blind)


def test_models_that_get_the_same_batches_read_images_alike(llava, tmp_path):
    model, text = llava
    require_same_eyes("teacher model", model, model, text)
    other = AutoModelForImageTextToText.from_pretrained(tiny_llava_next(tmp_path))
    with pytest.raises(ModelError, match=r"^teacher model: .* takes images in another way than"):
        require_same_eyes("teacher model", other, model, text)


def stage_of(name):
    from luthier.core.kinds import STAGES

    return STAGES.get(name)


def asks(**more):
    keys = {"fast_path": True, "cache_media_features": False, **more}
    method = SimpleNamespace(num_generations=4, num_iterations=1, grpo_beta=0.0)
    return SimpleNamespace(model=SimpleNamespace(**keys), finetuning=SimpleNamespace(**keys), method=method)


def test_rows_share_images_where_a_stage_repeats_prompts(llava, said):
    model, text = llava
    pixels, layout = pixels_for(model, text), layout_of(256, None)

    def shares(stage, run=None, pixels=pixels, **more):
        args = processes(1, **{"torch_compile": False, **more})
        run = run or asks()
        return shared_by_rows(run, stage_of(stage), {"model": model}, pixels, layout, args).shares

    assert [shares(stage) for stage in ("dpo", "rm", "kto", "grpo")] == [True] * 4
    assert said == ["images are encoded once for all rows of a batch that show them"] * 4
    assert not shares("sft")
    assert not shares("dpo", asks(fast_path=False))
    assert said[-1] == "images are encoded for each row that shows them: fast_path is false"
    assert not shares("dpo", torch_compile=True) and not shares("dpo", deepspeed_plugin=object())
    assert not shares("dpo", pixels=replace(pixels, kinds=("audio",)))
    keeps = asks(cache_media_features=True, fast_path=False)
    assert shares("sft", keeps)
    with pytest.raises(ModelError, match=r"^cache_media_features: DeepSpeed and torch_compile run the model as it is"):
        shares("sft", keeps, torch_compile=True)
