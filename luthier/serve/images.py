"""Images, videos and audio in requests: from what a part names to a file that the model reads.

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0..."}}     always
    {"type": "image_url", "image_url": {"url": "photos/cat.jpg"}}                       inside SAFE_MEDIA_PATH
    {"type": "image_url", "image_url": {"url": "https://example.org/cat.jpg"}}          with API_ALLOW_URLS=1
    {"type": "video_url", "video_url": {"url": "..."}}                                  the same
    {"type": "input_audio", "input_audio": {"data": "UklGR...", "format": "wav"}}       the same as audio_url

What is sent or fetched is kept in the cache under its SHA-256; the oldest files go when there are too many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os.path import isfile, realpath
from pathlib import Path

from luthier.core.errors import RowError
from luthier.core.paths import cache_root
from luthier.data.media.items import decoded, stored
from luthier.data.media.kinds import MediaKind
from luthier.serve.errors import ApiError
from luthier.serve.fetching import NotFetched, fetched

MAX_IMAGE_BYTES = 20_000_000
MAX_KEPT_BYTES = 64 * MAX_IMAGE_BYTES
"""As many as requests can wait, so that no file goes before its answer has begun."""
FOLDER = "served"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """What a request may name."""

    folder: Path | None = None
    """Files of the server in this folder; None for no files."""
    allows_urls: bool = False
    fetch: Callable[[str, int], bytes] = fetched
    """(address, most bytes) -> content."""

    def item_of(self, url: str, kind: MediaKind, place: str) -> str:
        """The item at an address. `place` is that of the part, e.g. `messages[0].content[1]`. Raises `ApiError`."""
        if url.startswith("data:"):
            path = _kept(_decoded(url, kind, place), kind, place)
        elif is_on_the_web(url):
            path = _kept(self._fetched(url, kind, place), kind, place)
        else:
            path = self._local(url.removeprefix("file://"), kind, place)
        try:
            kind.measured(path)
        except RowError as fault:
            reason = str(fault).replace(repr(path), "it").replace(path, "it")
            raise ApiError(f"{place}: this {kind.one} cannot be read: {reason}", param=place) from fault
        return kind.item(path)

    def having_fetched(self, urls: Sequence[str]) -> "ImageRules":
        """Rules that know the content of these addresses. It may take minutes to learn it."""
        known = {url: self._outcome(url) for url in urls}

        def content(url: str, _: int) -> bytes:
            found = known[url]
            if isinstance(found, NotFetched):
                raise found
            return found

        return replace(self, fetch=content)

    def _outcome(self, url: str) -> bytes | NotFetched:
        try:
            return self.fetch(url, MAX_IMAGE_BYTES)
        except NotFetched as fault:
            return fault

    def _fetched(self, url: str, kind: MediaKind, place: str) -> bytes:
        if not self.allows_urls:
            raise ApiError(
                f"{place}: this server fetches no {kind.plural} -> send it as {_example(kind)}, or start the"
                " server with API_ALLOW_URLS=1",
                param=place,
            )
        try:
            return self.fetch(url, MAX_IMAGE_BYTES)
        except NotFetched as fault:
            raise ApiError(f"{place}: the {kind.one} cannot be fetched: {fault}", param=place) from fault

    def _local(self, name: str, kind: MediaKind, place: str) -> str:
        """The same answer for a file outside and for one that is absent: nobody learns which files there are."""
        path = None
        if self.folder is not None and "\0" not in name:
            path = Path(realpath(self.folder / name))  # Path.resolve would raise for a link to itself
        # Path.is_file would raise for a name that is too long.
        if path is None or not path.is_relative_to(self.folder.resolve() if self.folder else path) or not isfile(path):
            raise ApiError(
                f"{place}: there is no such {kind.one} in the folder of the server (SAFE_MEDIA_PATH) -> send it as"
                f" {_example(kind)}",
                param=place,
            )
        return str(path)


def is_on_the_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


ONLY_SENT = ImageRules()
"""Files must come with the request."""


def _example(kind: MediaKind) -> str:
    types = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}
    return f"data:{types[kind.name]};base64,..."


def _decoded(url: str, kind: MediaKind, place: str) -> bytes:
    try:
        content = decoded(url)
    except ValueError as fault:
        raise ApiError(f"{place}: this is not {kind.name} data in base64: {fault}", param=place) from fault
    if len(content) > MAX_IMAGE_BYTES:
        raise ApiError(f"{place}: the {kind.one} has more than {MAX_IMAGE_BYTES:,} bytes", param=place)
    return content


def _kept(content: bytes, kind: MediaKind, place: str) -> str:
    folder = cache_root() / FOLDER
    try:
        path = stored(content, folder)
        _forget_oldest(folder)
    except OSError as fault:
        raise ApiError(
            f"{place}: the server cannot keep the {kind.one} ({fault.strerror})", status=500, type="server_error"
        ) from fault
    return path


def _forget_oldest(folder: Path) -> None:
    """Another server on this machine may do the same at the same time."""
    found = []
    for file in folder.iterdir():
        try:
            state = file.stat()
        except FileNotFoundError:
            continue
        found.append((state.st_atime_ns, state.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= MAX_KEPT_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= size
