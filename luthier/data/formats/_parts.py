"""Images in the parts of a content, for datasets that declare a column of images.

{"type": "image"}                                            an image of the column
{"type": "image", "image": "cat.png"}                        its own image; also `url`, `path`, `bytes`
{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
{"type": "input_image", "image_url": "cat.png"}
"""

from collections.abc import Mapping
from typing import Any

from luthier.core.errors import RowError
from luthier.data.formats._messages import IMAGE_PARTS
from luthier.data.media.items import image_tag, in_text, path_of

_KEYS = ("image", "image_url", "url", "path", "bytes", "base64")
"""Where a part holds its image."""


def with_images(message: Mapping[str, Any], key: str | None, place: str) -> Mapping[str, Any]:
    """The message with parts of text in place of its images: a tag, or the path of an image that a part brings along.

    Raises `RowError` for an image that cannot be read.
    """
    content = message.get(key) if key is not None else None
    if key is None or not isinstance(content, list):
        return message
    parts = [
        {"type": "text", "text": _text_of(part, f"part {number} of {key!r} of {place}")}
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS
        else part
        for number, part in enumerate(content, start=1)
    ]
    return {**message, key: parts}


def _text_of(part: Mapping[str, Any], place: str) -> str:
    key = next((key for key in _KEYS if part.get(key) is not None), None)
    if key is None:
        return image_tag()
    value = part[key]
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if key == "base64" and isinstance(value, str):
        value = f"data:image;base64,{value}"
    path = path_of(value, place)
    if "://" in path and not path.startswith("file://"):
        raise RowError(f"{place} names {path!r}: images are read from files only", repr(path))
    return in_text(path.removeprefix("file://"))
