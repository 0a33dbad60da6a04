"""Fetching for strangers, with a real web server on this machine that stands for both sides of the wall."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from luthier.serve import fetching
from luthier.serve.fetching import NotFetched, fetched, is_public

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        path, _, target = self.path.partition("?to=")
        status = {"/moved": 302, "/loop": 302, "/absent": 404, "/same": 304}.get(path, 200)
        content = b"x" * 5000 if path == "/long" else b"content"
        self.send_response(status)
        if status == 302:
            self.send_header("Location", target or "/loop")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """Names are looked up nowhere, and a busy machine may take its time."""
    own = socket.getaddrinfo

    def looked_up(host: str, *more: object, **options: object) -> object:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return own(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 600.0)
    monkeypatch.setattr(fetching, "MAX_SECONDS", 600.0)


def fetch(url: str, max_bytes: int = 1000) -> bytes:
    return fetched(url, max_bytes, is_allowed=lambda address: address == OUTSIDE)


def test_content_and_redirects(port):
    Handler.asked.clear()
    assert fetch(f"http://{OUTSIDE}:{port}/a.png") == b"content"
    assert fetch(f"http://{OUTSIDE}:{port}/moved?to=/b.png") == b"content"
    assert Handler.asked == [(f"{OUTSIDE}:{port}", path) for path in ("/a.png", "/moved?to=/b.png", "/b.png")]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"http://{INSIDE}:PORT/a", f"{INSIDE} is not an internet address"),
        ("http://localhost:PORT/a", "localhost is not an internet address"),
        (f"http://{OUTSIDE}:PORT/moved?to=http://{INSIDE}:PORT/secret", f"{INSIDE} is not an internet address"),
        (f"http://{OUTSIDE}:PORT/moved?to=file:///etc/passwd", "only plain addresses"),
        (f"http://{OUTSIDE}:PORT/loop", "more than 5 redirects"),
        (f"http://{OUTSIDE}:PORT/absent", "status 404"),
        (f"http://{OUTSIDE}:PORT/same", "status 304"),
        (f"http://{OUTSIDE}:PORT/long", "more than 1,000 bytes"),
        (f"http://me@{OUTSIDE}:PORT/a", "only plain addresses"),
        (f"http://{OUTSIDE}:1/a", f"{OUTSIDE}: "),
        ("http://no-such-host.invalid/a", "no-such-host.invalid: "),
        ("http://[::1]:PORT/a", "::1 is not an internet address"),
        ("ftp://example.org/a", "only plain addresses"),
        ("http://", "only plain addresses"),
        ("http://[", "this is not an address"),
        ("http://\u2100.com/", "this is not an address"),
        (f"http://{OUTSIDE}:PORT/moved?to=http://[", f"{OUTSIDE}: "),
    ],
)
def test_what_is_not_fetched(port, url, reason):
    Handler.asked.clear()
    with pytest.raises(NotFetched) as caught:
        fetch(url.replace("PORT", str(port)))
    assert reason in str(caught.value)
    assert "/secret" not in [path for _, path in Handler.asked]


def test_a_host_that_sends_a_byte_now_and_then(port, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_SECONDS", 0.0)
    with pytest.raises(NotFetched, match="takes longer than 0 s"):
        fetch(f"http://{OUTSIDE}:{port}/a.png")


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "64:ff9b::93.184.215.14"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::1", "ff02::1", "::"),
        *("64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b:1::10.0.0.1"),
    ],
)
def test_private_addresses(address):
    assert not is_public(address)
