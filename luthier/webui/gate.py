"""Who may reach the pages: the holder of the token, from the same origin, under a name that belongs to this machine.

The token of the printed link becomes a cookie. A page of another site can neither read the board nor act in it: the
cookie is not sent from there (SameSite), its Origin is refused, and a foreign name that was pointed at this address
(DNS rebinding) is refused for its Host.
"""

import hmac
import ipaddress
import platform
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' ws: wss:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy: nothing is loaded from another host. Vue compiles templates, which needs 'unsafe-eval'."""
_CLOSED = "Open the link that `luthier webui` printed: it holds the token.\n"
_ONWARD = '<!doctype html><meta http-equiv="refresh" content="0; url={path}"><title>luthier</title>'


class Gate:
    def __init__(self, app: ASGIApp, token: str, host: str, port: int) -> None:
        self.app, self._token = app, token
        self._names = {"localhost", host.lower(), platform.node().lower()}
        self._cookie = f"luthier_board_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, _guarded(send))
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer instead of that of the pages; None if the request may pass."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_own_name(host):
            return PlainTextResponse(f"{host}: not a name of this board\n", 421)
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            return PlainTextResponse("requests of other sites are refused\n", 403)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if given and self._is_token(given) and scope["type"] == "http":
            return self._enter(str(scope["path"]), headers)
        if self._is_token(_cookies(headers.get("cookie", "")).get(self._cookie, "")):
            return None
        return PlainTextResponse(_CLOSED, 401)

    def _enter(self, path: str, headers: Headers) -> Response:
        """To the page without the token in its address, with the cookie."""
        path = "/" + path.lstrip("/").translate({ord(mark): None for mark in "\"'<>&\\"})
        response: Response = RedirectResponse(path, 303)
        if headers.get("sec-fetch-site") == "cross-site":
            # A redirect would count as coming from the other site, so the cookie would not be sent.
            response = HTMLResponse(_ONWARD.format(path=path))
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
        response.headers["referrer-policy"] = "no-referrer"
        return response

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name.lower() in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _place(origin: str) -> str:
    """Host and port of an origin; empty for what is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _cookies(text: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(text).items()}
    except CookieError:
        return {}


def _guarded(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
        await send(message)

    return sent
