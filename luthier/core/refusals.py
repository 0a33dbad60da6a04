"""What a server says when it refuses a request."""

from http.client import IncompleteRead
from urllib.error import HTTPError


def body_of(fault: HTTPError, num_bytes: int) -> bytes:
    """The first `num_bytes` of the body, or what came of it before the connection was cut off."""
    with fault:
        try:
            return fault.read()[:num_bytes]
        except IncompleteRead as short:
            return short.partial[:num_bytes]
        except OSError:
            return b""
