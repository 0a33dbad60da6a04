"""Contents as lists of parts, and what chat templates write around images."""

import pytest

from luthier.data.chat.parts import around_item, as_parts, in_parts, num_places, places_in
from luthier.data.types import AUDIO_PLACE, PLACE, VIDEO_PLACE
from tests.media_models import IMAGES_FIRST, in_order
from tests.tiny import byte_tokenizer


def test_parts_of_a_text():
    text, image = {"type": "text", "text": "a"}, {"type": "image"}
    assert as_parts(f"{PLACE}a{PLACE}{PLACE}") == [image, text, image, image]
    video, audio = {"type": "video"}, {"type": "audio"}
    assert as_parts(f"{VIDEO_PLACE}{AUDIO_PLACE}a{PLACE}") == [video, audio, text, image]
    assert as_parts("") == [{"type": "text", "text": ""}]


def test_only_contents_with_images_or_all():
    plain, seen, call = {"content": "a"}, {"content": f"a{PLACE}"}, {"content": None}
    assert in_parts([plain, seen, call], all_contents=False) == [plain, {"content": as_parts(f"a{PLACE}")}, call]
    assert in_parts([plain, call], all_contents=True) == [{"content": as_parts("a")}, call]
    assert places_in([plain, seen, call]) == PLACE and num_places(f"a{PLACE}{AUDIO_PLACE}b") == 2


@pytest.mark.parametrize(
    ("program", "around"),
    [
        (in_order("<m>"), ("", "")),
        (in_order("<a><m><b>"), ("<a>", "<b>")),
        (in_order("\n<a> <m> <b>\n"), ("<a> ", " <b>")),
        (in_order("Picture {{ loop.index }}:<a><m><b>"), (":<a>", "<b>")),
        (IMAGES_FIRST.replace("<image>", "<m>"), ("", "")),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content + 'x' }}{% endfor %}", None),
    ],
)
def test_around_an_image(program, around):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = program
    assert around_item(tokenizer, program, "image", "<m>") == around
