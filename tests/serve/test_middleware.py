"""What surrounds a request, without a server: sizes of bodies, and the count of requests."""

import asyncio

from luthier.serve.metrics import Metrics
from luthier.serve.middleware import Surroundings


def ask(chunks, *, max_body_bytes=10, method="POST", keys=(), headers=()):
    """(status, body that the application got, the metrics)"""
    seen, sent, metrics = [], [], Metrics()
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    given = iter([*messages, {"type": "http.disconnect"}])

    async def app(scope, receive, send):
        seen.append((await receive())["body"])
        seen.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return next(given)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/x", "headers": list(headers)}
    around = Surroundings(app, keys, metrics, max_body_bytes=max_body_bytes)
    asyncio.run(around(scope, receive, send))
    return sent[0]["status"], seen, metrics


def test_a_body_arrives_whole_and_then_the_client_may_leave():
    status, seen, metrics = ask([b"abc", b"def"])
    assert (status, seen) == (200, [b"abcdef", "http.disconnect"])
    assert metrics.requests == {("other", 200): 1} and metrics.seconds.count == 1


def test_a_body_that_is_too_large_is_refused_wherever_it_grows():
    for chunks in ([b"x" * 11], [b"x" * 6, b"x" * 6], [b"x"] * 11):
        status, seen, _ = ask(chunks)
        assert (status, seen) == (413, [])
    assert ask([b"x" * 10])[0] == 200


def test_a_key_is_asked_for_before_the_body_is_read():
    assert ask([b"x" * 11], keys=("k",))[0] == 401
    assert ask([b"x"], keys=("k",), headers=[(b"authorization", b"bearer k")])[0] == 200
    assert ask([b"x"], keys=("k",), headers=[(b"authorization", b"Basic k")])[0] == 401
