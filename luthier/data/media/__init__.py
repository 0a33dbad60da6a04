"""Images, videos and audio of examples: where their files are, and whether an example with media can be used at all."""

import os
from typing import TYPE_CHECKING

from luthier.core.errors import MediaFault, RowError
from luthier.data.types import Media

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec


def media_path(path: str, spec: "DatasetSpec") -> str:
    """Relative paths start from `media_dir`. Rows from a hub or a cloud keep theirs: the files are elsewhere."""
    return os.path.join(spec.media_dir, path) if _is_local(path, spec) else path


def require_usable(media: Media, spec: "DatasetSpec") -> None:
    """Raises `MediaFault` for a file that is missing, and `RowError` for any media, since this version reads text."""
    columns = spec.columns
    named = ((columns.images, media.images), (columns.videos, media.videos), (columns.audios, media.audios))
    for column, paths in named:
        for path in paths:
            if _is_local(path, spec) and not os.path.isfile(path):
                folder = spec.media_dir or "."
                reason = f"column {column!r} names {path!r}, which is not a file (media_dir is {folder})"
                raise MediaFault(reason, repr(path))
    if media != Media():
        raise RowError("the row has images, videos or audio, and this version reads text only")


def _is_local(path: str, spec: "DatasetSpec") -> bool:
    return spec.source.kind == "file" and "://" not in path
