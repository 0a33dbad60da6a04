"""One request to a server on this machine, whose answer is a stream of server-sent events."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

SILENCE_SECONDS = 3600.0
"""How long a server may send nothing. Its queue may be long, but one whose host is gone says nothing, ever."""
_READ_BYTES = 65536
_LONGEST_MESSAGE = 500


class Refused(Exception):
    """The server answered with an error. `is_input`: because of what was asked."""

    def __init__(self, message: str, *, is_input: bool) -> None:
        super().__init__(message)
        self.is_input = is_input


class Call:
    """A POST of JSON. Iterate over `events` in one thread; `hang_up` may come from any other.

    A server that loses its client stops generating for it.
    """

    def __init__(self, host: str, port: int, path: str, body: Mapping[str, Any], key: str) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=SILENCE_SECONDS)
        self._path, self._body, self._key = path, body, key
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._is_over = False

    def events(self) -> Iterator[Any]:
        """The JSON of each event until `[DONE]`. Raises `Refused`, and `OSError` or `HTTPException` if it breaks."""
        try:
            with self._lock:
                if self._is_over:
                    return
                self._connection.connect()
                self._socket = self._connection.sock
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
            self._connection.request("POST", self._path, json.dumps(self._body), headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise Refused(message_of(response.read()), is_input=400 <= response.status < 500)
            for line in _lines(response):
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if isinstance(event, dict) and event.get("error"):
                    raise Refused(message_of(data), is_input=_is_input(event["error"]))
                yield event
        finally:
            self.hang_up()
            self._connection.close()

    def hang_up(self) -> None:
        """Break the connection. Whoever waits for the next event gets an error, or the end."""
        with self._lock:
            self._is_over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # closed already
                    self._socket.shutdown(socket.SHUT_RDWR)


def get_json(host: str, port: int, path: str, key: str) -> Any:
    """The JSON at a path. Raises `OSError`, `HTTPException` and `ValueError`."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def message_of(body: bytes) -> str:
    """What an error says: `{"error": {"message"}}`, `{"error": text}`, `{"detail"}`, or the text itself."""
    text = body.decode("utf-8", "replace")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = text
    if isinstance(content, dict):
        content = content.get("error") or content.get("detail") or content.get("message") or content
    if isinstance(content, dict):
        content = content.get("message") or content
    return " ".join(str(content).split())[:_LONGEST_MESSAGE] or "no reason given"


def _is_input(error: Any) -> bool:
    code = error.get("code") if isinstance(error, dict) else None
    return isinstance(code, int) and 400 <= code < 500


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    held = b""
    while piece := response.read1(_READ_BYTES):
        *whole, held = (held + piece).split(b"\n")
        yield from whole
    if held:
        yield held
