"""Events are read whole however they arrive, errors are said in one form, and a call can be broken off."""

import contextlib
import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from luthier.infer.servers import calls
from luthier.infer.servers.calls import Call, Refused, get_json, message_of

EVENT = b'data: {"a": "\xc3\xa9"}\n\n'


@pytest.fixture
def served():
    """A server that answers POST with a status and pieces; it notes what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        status, pieces, asked = 200, [], []

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"path": self.path, "key": self.headers["Authorization"]}).encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.asked.append((self.path, self.headers["Authorization"], json.loads(body)))
            self.send_response(self.status)
            self.end_headers()
            for piece in self.pieces:
                if isinstance(piece, threading.Event):
                    piece.wait()
                else:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(0.01)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def call(server, status=200, pieces=()) -> Call:
    server.RequestHandlerClass.status, server.RequestHandlerClass.pieces = status, list(pieces)
    return Call("127.0.0.1", server.server_address[1], "/v1/x", {"q": [1, 2]}, "secret")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_whole_however_they_are_cut(served, size):
    stream = b": ping\n\n" + EVENT + b"event: x\n" + EVENT + b"data: [DONE]\n\n" + EVENT
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert list(call(served, pieces=pieces).events()) == [{"a": "é"}] * 2
    assert served.RequestHandlerClass.asked[-1] == ("/v1/x", "Bearer secret", {"q": [1, 2]})


def test_the_last_event_needs_no_line_break(served):
    assert list(call(served, pieces=[EVENT, EVENT.rstrip()]).events()) == [{"a": "é"}] * 2


@pytest.mark.parametrize(("status", "is_input"), [(400, True), (404, True), (500, False), (503, False)])
def test_an_error_status_is_refused_with_its_message(served, status, is_input):
    with pytest.raises(Refused, match=r"^too long$") as caught:
        list(call(served, status, [b'{"error": {"message": "too long"}}']).events())
    assert caught.value.is_input is is_input


@pytest.mark.parametrize(("code", "is_input"), [(400, True), (500, False), (None, False)])
def test_an_error_event_is_refused_after_what_came_before(served, code, is_input):
    event = json.dumps({"error": {"message": "out of memory", "code": code}}).encode()
    events = call(served, pieces=[EVENT, b"data: " + event + b"\n\ndata: [DONE]\n\n"]).events()
    assert next(events) == {"a": "é"}
    with pytest.raises(Refused, match="out of memory") as caught:
        next(events)
    assert caught.value.is_input is is_input


def test_hanging_up_wakes_whoever_waits_for_the_next_event(served):
    """Else it would wait for the server, which sends another one in vain."""
    was_hung_up, found = threading.Event(), []
    one = call(served, pieces=[EVENT, was_hung_up, EVENT])
    events = one.events()
    assert next(events)

    def wait():
        with contextlib.suppress(OSError, http.client.HTTPException):
            found.extend(events)

    thread = threading.Thread(target=wait)
    thread.start()
    one.hang_up()
    thread.join(60)
    assert not thread.is_alive() and found == []
    was_hung_up.set()


def test_a_server_that_is_silent_for_too_long_is_an_os_error(served, monkeypatch):
    """Such as one whose host is gone: nothing tells this one so."""
    monkeypatch.setattr(calls, "SILENCE_SECONDS", 0.5)
    was_read = threading.Event()
    events = call(served, pieces=[EVENT, was_read, EVENT]).events()
    assert next(events)
    with pytest.raises(TimeoutError):
        next(events)
    was_read.set()


def test_a_call_that_was_hung_up_before_it_began_asks_nothing(served):
    served.RequestHandlerClass.asked.clear()
    one = call(served, pieces=[EVENT])
    one.hang_up()
    assert list(one.events()) == [] and served.RequestHandlerClass.asked == []


def test_nobody_there_is_an_os_error(served):
    with pytest.raises(OSError):
        list(Call("127.0.0.1", 1, "/", {}, "").events())


def test_json_is_fetched_with_the_key(served):
    assert get_json("127.0.0.1", served.server_address[1], "/v1/models", "k") == {
        "path": "/v1/models",
        "key": "Bearer k",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "a\\n b", "code": 1}}', "a b"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"message": "m"}', "m"),
        ("Internal Server Error", "Internal Server Error"),
        ("", "no reason given"),
        ("x" * 900, "x" * 500),
    ],
)
def test_the_message_of_an_error(body, message):
    assert message_of(body.encode()) == message
