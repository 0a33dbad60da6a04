"""Images in the parts of a content."""

import pytest

from luthier.core.errors import RowError
from luthier.data.formats._parts import with_images
from luthier.data.media.items import CLOSE, OPEN, stored


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image"}, "<image>"),
        ({"type": "image_url"}, "<image>"),
        ({"type": "image", "image": "a.png"}, f"{OPEN}a.png{CLOSE}"),
        ({"type": "image", "url": "file:///b/a.png"}, f"{OPEN}/b/a.png{CLOSE}"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, f"{OPEN}a.png{CLOSE}"),
        ({"type": "input_image", "image_url": "a.png"}, f"{OPEN}a.png{CLOSE}"),
        ({"type": "image", "base64": "eHk="}, f"{OPEN}{stored(b'xy')}{CLOSE}"),
        ({"type": "image", "image": {"bytes": b"xy", "path": None}}, f"{OPEN}{stored(b'xy')}{CLOSE}"),
    ],
)
def test_a_part_becomes_text(part, text):
    message = {"role": "user", "content": [part, {"type": "text", "text": "b"}]}
    changed = with_images(message, "content", "message 1")
    assert changed == {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": "b"}]}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image", "image": 5}, "part 1 of 'content' of message 1 is of type int, not a path"),
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            "part 1 of 'content' of message 1 names 'https://example.org/a.png': images are read from files only",
        ),
    ],
)
def test_what_is_no_image(part, reason):
    with pytest.raises(RowError) as caught:
        with_images({"content": [part]}, "content", "message 1")
    assert str(caught.value) == reason


@pytest.mark.parametrize("message", [{"content": "text"}, {"content": [{"type": "text", "text": "a"}, 5]}, {}])
def test_everything_else_stays(message):
    assert with_images(message, "content", "message 1") == message
