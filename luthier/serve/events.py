"""Server-sent events, and work that ends when the client is gone.

A non-streaming handler is never told that its client is gone, and a stream only when it next sends. So both watch the
connection while they work.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from luthier.serve.errors import ApiError

PING_SECONDS = 10.0
"""A comment line goes out after this long without an event, so that proxies keep the connection."""
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody is left to answer."""


def event(data: Mapping[str, Any]) -> bytes:
    """Everything but ASCII is escaped, since some clients take U+2028 and the like for the end of a line."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return b"event: error\n" + event(error.body())


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is canceled if the client disconnects. Raises `ClientGone` then.

    The body of the request has been read.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, a ping where none comes for long, and `[DONE]` after the last.

    An `ApiError` becomes an event of its own, after which nothing follows.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
        ping_seconds: float = PING_SECONDS,
    ) -> None:
        """`close` is called at the end, also if not a single event was sent."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._close, self._ping_seconds = events, close, ping_seconds
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            pass
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.create_task(self._ping(send))
        try:
            async with aclosing(with_end(self._events)) as events:
                async for data in events:
                    await self._send(send, data)
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _ping(self, send: Send) -> None:
        """One task for the whole stream, since a timer for each event would cost more than the event."""
        while True:
            silence = time.monotonic() - self._sent_at
            if silence >= self._ping_seconds:
                await self._send(send, PING)
                silence = 0.0
            await asyncio.sleep(self._ping_seconds - silence)


async def with_end(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events and the end mark, or an event for the error that ended them."""
    async with aclosing(events):
        try:
            async for data in events:
                yield data
        except ApiError as error:
            yield error_event(error)
            return
        yield DONE
