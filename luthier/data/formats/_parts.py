"""Media in the parts of a content, for datasets that declare a column of that kind.

{"type": "image"}                                            an image of the column; so with `video` and `audio`
{"type": "image", "image": "cat.png"}                        its own image; also `url`, `path`, `bytes`
{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
{"type": "input_image", "image_url": "cat.png"}
{"type": "input_audio", "input_audio": {"data": "UklGR...", "format": "wav"}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.errors import RowError
from luthier.data.media.items import in_text
from luthier.data.media.kinds import MediaKind


def with_media(
    message: Mapping[str, Any], key: str | None, place: str, kinds: Sequence[MediaKind]
) -> Mapping[str, Any]:
    """The message with parts of text in place of its media: a tag, or the path of an item that a part brings along.

    Raises `RowError` for an item that cannot be read.
    """
    content = message.get(key) if key is not None else None
    if key is None or not isinstance(content, list):
        return message
    by_type = {name: kind for kind in kinds for name in kind.parts}
    parts = [
        {"type": "text", "text": _text_of(part, f"part {number} of {key!r} of {place}", by_type[part["type"]])}
        if isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] in by_type
        else part
        for number, part in enumerate(content, start=1)
    ]
    return {**message, key: parts}


def _text_of(part: Mapping[str, Any], place: str, kind: MediaKind) -> str:
    key = next((key for key in kind.keys if part.get(key) is not None), None)
    if key is None:
        return kind.written_tag
    value = part[key]
    if isinstance(value, Mapping) and key not in ("path", "bytes"):
        value = value.get("url") or (f"data:{kind.name};base64,{value['data']}" if "data" in value else value)
    if key == "base64" and isinstance(value, str):
        value = f"data:{kind.name};base64,{value}"
    path = kind.path_of(value, place)
    if "://" in path and not path.startswith("file://"):
        raise RowError(f"{place} names {path!r}: {kind.plural} are read from files only", repr(path))
    return in_text(path.removeprefix("file://"), kind)
