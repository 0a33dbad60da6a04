"""Decodes UTF-8 from byte streams piece by piece. A byte order mark is dropped; LF and CRLF both end a line."""

import codecs
from collections.abc import Iterator
from typing import IO

from luthier.core.errors import DataError
from luthier.data.sources.readers import DataFile

FIRST_WINDOW_BYTES = 1 << 16
WINDOW_BYTES = 1 << 20

_OTHER_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def chunks(file: DataFile, stream: IO[bytes]) -> Iterator[str]:
    """The text of a file in windows. The first one is small, so that reading one row is fast. Raises `DataError`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done_bytes, size = 0, FIRST_WINDOW_BYTES
    while True:
        data = stream.read(size)
        if done_bytes == 0:
            data, done_bytes = _without_mark(file, data)
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, done_bytes - len(pending) + error.start, error.object[error.start]) from error
        if text:
            yield text
        if not data:
            return
        done_bytes, size = done_bytes + len(data), WINDOW_BYTES


def lines(file: DataFile, stream: IO[bytes]) -> Iterator[str]:
    """The lines of a file, including their line ends. Raises `DataError`."""
    done_bytes = 0
    for data in stream:
        if done_bytes == 0:
            data, done_bytes = _without_mark(file, data)
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(file, done_bytes + error.start, data[error.start]) from error
        done_bytes += len(data)


def _without_mark(file: DataFile, data: bytes) -> tuple[bytes, int]:
    """The data after a byte order mark, and the length of the mark."""
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise DataError(f"{file.name}: the file is {encoding}, not UTF-8 -> save it as UTF-8")
    rest = data.removeprefix(codecs.BOM_UTF8)
    return rest, len(data) - len(rest)


def _not_utf8(file: DataFile, position: int, byte: int) -> DataError:
    return DataError(
        f"{file.name}: not UTF-8 (byte 0x{byte:02x} at position {position}) -> convert the file, "
        f"for example with `iconv -t UTF-8`"
    )
