"""What a server says when it refuses a request, or answers with something else than JSON."""

import json
from email.message import Message as Headers
from http.client import IncompleteRead
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request


class NoRedirect(HTTPRedirectHandler):
    """A redirect is an `HTTPError`: urllib would repeat a POST as a GET without its body, and send a key to whatever
    host it names."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> Request | None:
        return None


def body_of(fault: HTTPError, num_bytes: int) -> bytes:
    """The first `num_bytes` of the body, or what came of it before the connection was cut off."""
    with fault:
        try:
            return fault.read()[:num_bytes]
        except IncompleteRead as short:
            return short.partial[:num_bytes]
        except OSError:
            return b""


def json_of(body: bytes) -> Any:
    """Raises `ValueError` that shows what the body is instead, such as the page of another program."""
    try:
        return json.loads(body)
    except ValueError as fault:
        begins = body[:80].decode(errors="replace")
        raise ValueError(f"the response is not JSON, it begins with {begins!r}") from fault
