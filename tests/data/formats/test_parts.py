"""Media in the parts of a content."""

import pytest

from luthier.core.errors import RowError
from luthier.data.formats._parts import with_media
from luthier.data.media.items import CLOSE, OPEN, stored
from luthier.data.media.kinds import media_kinds
from luthier.data.types import AUDIO_PLACE, PLACE, VIDEO_PLACE


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image"}, "<image>"),
        ({"type": "image_url"}, "<image>"),
        ({"type": "image", "image": "a.png"}, f"{OPEN}{PLACE}a.png{CLOSE}"),
        ({"type": "image", "url": "file:///b/a.png"}, f"{OPEN}{PLACE}/b/a.png{CLOSE}"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, f"{OPEN}{PLACE}a.png{CLOSE}"),
        ({"type": "input_image", "image_url": "a.png"}, f"{OPEN}{PLACE}a.png{CLOSE}"),
        ({"type": "image", "base64": "eHk="}, f"{OPEN}{PLACE}{stored(b'xy')}{CLOSE}"),
        ({"type": "image_url", "value": "a.png"}, f"{OPEN}{PLACE}a.png{CLOSE}"),
        ({"type": "video"}, "<video>"),
        ({"type": "video_url", "value": "a.mp4"}, f"{OPEN}{VIDEO_PLACE}a.mp4{CLOSE}"),
        ({"type": "audio_url", "value": "a.wav"}, f"{OPEN}{AUDIO_PLACE}a.wav{CLOSE}"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, f"{OPEN}{VIDEO_PLACE}a.mp4{CLOSE}"),
        ({"type": "audio", "audio": "a.wav"}, f"{OPEN}{AUDIO_PLACE}a.wav{CLOSE}"),
        (
            {"type": "input_audio", "input_audio": {"data": "eHk=", "format": "wav"}},
            f"{OPEN}{AUDIO_PLACE}{stored(b'xy')}{CLOSE}",
        ),
        ({"type": "image", "image": {"bytes": b"xy", "path": None}}, f"{OPEN}{PLACE}{stored(b'xy')}{CLOSE}"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",  # a text may name a folder of this process
)
def test_a_part_becomes_text(part, text):
    message = {"role": "user", "content": [part, {"type": "text", "text": "b"}]}
    changed = with_media(message, "content", "message 1", media_kinds())
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
        with_media({"content": [part]}, "content", "message 1", media_kinds())
    assert str(caught.value) == reason


@pytest.mark.parametrize("message", [{"content": "text"}, {"content": [{"type": "text", "text": "a"}, 5]}, {}])
def test_everything_else_stays(message):
    assert with_media(message, "content", "message 1", media_kinds()) == message


def test_a_kind_that_is_not_declared_stays():
    part = {"type": "audio", "audio": "a.wav"}
    assert with_media({"content": [part]}, "content", "message 1", media_kinds()[:1]) == {"content": [part]}
