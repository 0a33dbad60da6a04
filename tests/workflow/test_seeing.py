"""When a batch without images gets one, and which models may share batches with images."""

from types import SimpleNamespace

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from luthier.core.errors import ModelError
from luthier.data.media.blocks import MediaProcessor
from luthier.workflow.seeing import pixels_for, require_same_eyes, training_pixels, trial_of
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
