"""The processor is asked once for each size, with black images, and what it answers is a block."""

import pickle
from types import SimpleNamespace

import pytest

from luthier.core.errors import ModelError, RowError
from luthier.data.media.blocks import MediaProcessor
from luthier.data.media.kinds import Shape
from tests.torchvision_models import FAMILIES


def images(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape("image", size) for size in sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_is_asked_for_once(worlds, family, monkeypatch):
    media = MediaProcessor(worlds(family).text.media.processor)
    asked = []
    monkeypatch.setattr(
        MediaProcessor, "_asked", lambda self, sizes, ask=MediaProcessor._asked: asked.append(sizes) or ask(self, sizes)
    )
    assert media.is_joint == (family == "llava_onevision")
    asked.clear()
    shapes = images((56, 84), (30, 200), (56, 84))
    first = media.blocks(shapes)
    assert first[0] == first[2] and media.blocks(shapes) == first
    if media.is_joint:
        assert asked == [shapes]
        return
    assert media.blocks(shapes[1:2]) == first[1:2]
    assert asked == [shapes[:1], shapes[1:2]]


def test_it_can_be_sent_to_another_process(worlds):
    media = worlds("paddleocr_vl").text.media
    sent = pickle.loads(pickle.dumps(media))
    assert sent.blocks(images((56, 84))) == media.blocks(images((56, 84))) == ("<|IMAGE_PLACEHOLDER|>" * 6,)
    assert sent.digest == media.digest


def test_the_digest_is_that_of_the_limits(worlds):
    processor = pickle.loads(pickle.dumps(worlds("paddleocr_vl").text.media.processor))
    before = MediaProcessor(processor).digest
    processor.image_processor.size["longest_edge"] *= 2
    assert MediaProcessor(processor).digest != before


def test_a_refused_size_is_named(worlds):
    with pytest.raises(RowError, match="refuses an image of 10x2001 pixels") as caught:
        worlds("paddleocr_vl").text.media.blocks(images((10, 2001)))
    assert "10x2001" not in caught.value.kind


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("PaliGemmaProcessor", "adds tokens to each prompt itself, and takes no row without an image"),
        ("MllamaProcessor", "its images enter by cross attention"),
        ("VoxtralProcessor", "its chat template is part of the library mistral_common"),
        ("GraniteSpeechProcessor", "its model switches on an adapter of its own"),
        ("OtherProcessor", "has no token that stands for an image"),
    ],
)
def test_what_cannot_be_used(kind, why):
    with pytest.raises(ModelError, match=f"images: {kind}: .*{why}.* -> "):
        MediaProcessor(type(kind, (SimpleNamespace,), {})())


def test_a_mark_in_the_text_is_reserved(worlds):
    assert tuple(worlds("gemma3").text.media.reserved) == ("<start_of_image>", "<image_soft_token>")
