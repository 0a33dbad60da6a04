"""Streams: pings in silence, an end mark after the last event, none after an error, and the client that leaves."""

import asyncio
import json

import pytest

from luthier.serve.errors import ApiError
from luthier.serve.events import DONE, PING, ClientGone, EventStream, event, while_connected


async def listed(events, ping_seconds=600.0, pinged=None):
    """The bodies that a stream sends. `pinged`: the event that is set by the first ping."""
    sent = []

    async def send(message):
        sent.append(message)
        if pinged is not None and message.get("body") == PING:
            pinged.set()

    await EventStream(events, lambda: None, ping_seconds=ping_seconds)({"type": "http"}, connected, send)
    assert sent[0]["type"] == "http.response.start" and not sent[-1]["more_body"] and not sent[-1]["body"]
    return [message["body"] for message in sent[1:-1]]


async def slow(*steps):
    for step in steps:
        if isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, Exception):
            raise step
        else:
            yield step


def test_the_end_mark_follows_the_last_event():
    assert asyncio.run(listed(slow(b"a", b"b"))) == [b"a", b"b", DONE]


def test_a_ping_goes_out_in_silence():
    async def silent_until_the_ping():
        pinged = asyncio.Event()
        return await listed(slow(b"a", pinged, b"b"), ping_seconds=0.1, pinged=pinged)

    found = asyncio.run(silent_until_the_ping())
    assert [one for one in found if one != PING] == [b"a", b"b", DONE] and found[1] == PING
    assert PING not in asyncio.run(listed(slow(b"a", b"b")))


def test_a_pause_that_is_shorter_than_the_silence_is_no_reason_for_a_ping():
    async def paused():
        yield b"a"
        await asyncio.sleep(0.02)  # the task of the pings has looked meanwhile
        yield b"b"

    assert asyncio.run(listed(paused())) == [b"a", b"b", DONE]


def test_nothing_follows_an_error():
    found = asyncio.run(listed(slow(b"a", ApiError("broken", status=500, type="server_error"))))
    assert found[0] == b"a" and len(found) == 2
    name, data = found[1].decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == "broken"


def test_events_are_ascii_and_one_line():
    data = event({"text": "a\nb\u2028\x85\r"})
    assert data.isascii() and data.endswith(b"\n\n") and data.count(b"\n") == 2
    assert json.loads(data.removeprefix(b"data: ")) == {"text": "a\nb\u2028\x85\r"}


async def connected(for_seconds=None):
    """Disconnects after some seconds, or never."""
    if for_seconds is None:
        await asyncio.Event().wait()
    await asyncio.sleep(for_seconds)
    return {"type": "http.disconnect"}


def test_work_is_canceled_when_the_client_leaves():
    canceled = []

    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            canceled.append(True)
            raise

    with pytest.raises(ClientGone):
        asyncio.run(while_connected(lambda: connected(0.05), work()))
    assert canceled == [True]


def test_work_that_is_done_gives_its_result():
    async def work():
        return 5

    assert asyncio.run(while_connected(connected, work())) == 5


def test_a_stream_is_closed_even_if_nothing_was_sent():
    closed, sent = [], []

    async def send(message):
        await asyncio.Event().wait()
        sent.append(message)

    async def serve():
        stream = EventStream(slow(b"a"), lambda: closed.append(True))
        await stream({"type": "http"}, lambda: connected(0.02), send)

    asyncio.run(serve())
    assert closed == [True] and sent == []
