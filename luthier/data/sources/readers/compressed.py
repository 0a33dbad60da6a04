"""Compressed text files: which extensions there are, and their bytes, decompressed while they are read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from luthier.core.errors import DataError
from luthier.data.sources.readers import DataFile


def _zstandard(stream: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(stream, "zstd")


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gz": lambda stream: gzip.GzipFile(fileobj=stream),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": _zstandard,
}
COMPRESSIONS = tuple(_OPENERS)
"""Extensions that may follow that of a text file."""
TEXT_KINDS = ("json", "jsonl", "csv", "txt")
_WINDOW_BYTES = 1 << 20


def data_file(name: str, open: Callable[[], IO[bytes]]) -> DataFile:
    """The file with this name; `open` gives its bytes as they are stored."""
    kind, compression = split_extensions(name)
    return DataFile(name, kind, open if not compression else lambda: decompressed(name, compression, open()))


def split_extensions(name: str) -> tuple[str, str]:
    """(kind, compression): `("jsonl", "gz")` for a.jsonl.gz. Only text is read compressed: `("tar.gz", "")`."""
    base = name.replace("\\", "/").rpartition("/")[2].lower()
    rest, _, last = base.rpartition(".")
    inner = rest.rpartition(".")[2] if "." in rest else ""
    if last not in COMPRESSIONS or not rest:
        return (last if rest else ""), ""
    return (inner, last) if inner in TEXT_KINDS else (f"{inner}.{last}".lstrip("."), "")


def decompressed(name: str, compression: str, stream: IO[bytes]) -> IO[bytes]:
    """The bytes in a compressed stream, which is closed with them. Reading raises `DataError` where it is broken."""
    return cast("IO[bytes]", io.BufferedReader(_Decompressed(name, compression, stream), _WINDOW_BYTES))


class _Decompressed(io.RawIOBase):
    def __init__(self, name: str, compression: str, stream: IO[bytes]) -> None:
        self._file, self._compression, self._stream = name, compression, stream
        self._bytes = _OPENERS[compression](stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._bytes.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{self._file}: not a readable {self._compression} file ({error}) -> it was cut off or damaged; "
                f"write or download it again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._bytes.close()
            self._stream.close()
        super().close()
