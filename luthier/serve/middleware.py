"""What surrounds every request: its id, the key, the size of its body, and the count of requests.

Written for ASGI itself: `BaseHTTPMiddleware` of Starlette hides from a handler that its client is gone.
"""

import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.serve.errors import ApiError, too_large, wrong_key
from luthier.serve.metrics import Metrics

MAX_BODY_BYTES = 32 * 2**20
MAX_SWALLOWED_BYTES = 256 * 2**20
"""So much of a body that is too large is still read, so that the client is ready to read why it is refused."""
OPEN_PATHS = ("/health", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")
"""Paths that need no key."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Surroundings:
    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        metrics: Metrics,
        root_path: str = "",
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """`root_path`: under which a proxy serves the application; it may or may not be part of the path here."""
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes
        self._root_path = root_path.rstrip("/")
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["root_path"] = self._root_path
        started, status = time.perf_counter(), 500
        given_id = Headers(scope=scope).get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else f"req_{uuid.uuid4().hex}"

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._answer(scope, receive, sent)
        finally:
            # A path that no route has is counted under one name, so that nobody can make the counts grow.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[route, status] += 1
            self.metrics.seconds.observe(time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and _path(scope) not in OPEN_PATHS and not self._has_key(scope):
            await error_response(wrong_key())(scope, receive, send)
            return
        body = await self._body(receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        if body is None:
            await error_response(too_large(self.max_body_bytes))(scope, receive, send)
            return
        await self.app(scope, _after(body, receive), send)

    def _has_key(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared, so that the time says nothing about which one is close.
        found = [hmac.compare_digest(given, own) for own in self._keys]
        return kind.lower() == "bearer" and any(found)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or None if it is too large."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(chunks) if size <= self.max_body_bytes else None
            size += len(message.get("body", b""))
            if size <= self.max_body_bytes:
                chunks.append(message.get("body", b""))
            else:
                chunks.clear()
            if not message.get("more_body") or size > MAX_SWALLOWED_BYTES:
                return b"".join(chunks) if size <= self.max_body_bytes else None


def _after(body: bytes, receive: Receive) -> Receive:
    """First the whole body, then what else the server says."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope["root_path"])
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
