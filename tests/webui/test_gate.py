"""Only the holder of the token gets in, under a name of this machine and from no other site."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from luthier.webui.gate import Gate

TOKEN = "a-token"
BASE = "http://127.0.0.1:7860"
HOST = {"host": "127.0.0.1:7860"}


async def pages(scope, receive, send):
    if scope["type"] == "websocket":
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        await socket.close()
        return
    await PlainTextResponse("inside")(scope, receive, send)


@pytest.fixture
def client():
    return TestClient(Gate(pages, TOKEN, "127.0.0.1", 7860), base_url=BASE, follow_redirects=False)


def test_the_token_becomes_a_cookie_and_leaves_the_address(client):
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == client.get("/?token=").status_code == 401
    entered = client.get(f"/?token={TOKEN}")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "luthier_board_7860=" in cookie
    inside = client.get("/run/one")
    assert inside.text == "inside" and "default-src 'self'" in inside.headers["content-security-policy"]


def test_a_link_from_another_site_is_followed_by_the_page_itself(client):
    entered = client.get(f"/?token={TOKEN}", headers={"sec-fetch-site": "cross-site"})
    assert entered.status_code == 200 and 'content="0; url=/"' in entered.text
    odd = client.get(f"/%22%3E%3Cscript%3E//evil?token={TOKEN}", headers={"sec-fetch-site": "cross-site"})
    assert "<script>" not in odd.text
    assert client.get(f"/%2Fevil.example/?token={TOKEN}").headers["location"] == "/evil.example/"


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1:7860", True),
        ("localhost:7860", True),
        ("[::1]:7860", True),
        ("192.168.1.7:7860", True),
        ("evil.example:7860", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_a_foreign_name_that_points_here_is_refused(client, host, is_ours):
    client.cookies.set("luthier_board_7860", TOKEN)
    assert client.get("/", headers={"host": host}).status_code == (200 if is_ours else 421)


@pytest.mark.parametrize(
    ("origin", "is_ours"),
    [(BASE, True), (None, True), ("http://127.0.0.1:9999", False), ("https://evil.example", False), ("null", False)],
)
def test_another_site_can_neither_post_nor_open_a_socket(client, origin, is_ours):
    client.cookies.set("luthier_board_7860", TOKEN)
    headers = {} if origin is None else {"origin": origin}
    assert client.post("/", headers=headers).status_code == (200 if is_ours else 403)
    if is_ours:
        with client.websocket_connect("/socket", headers=headers | HOST):
            return
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/socket", headers=headers | HOST):
        raise AssertionError("the socket is open")


def test_a_socket_needs_the_cookie(client):
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/socket", headers=HOST):
        raise AssertionError("the socket is open")


@pytest.mark.parametrize("origin", ["http://[", "null", "", "http://evil.example", "http://127.0.0.1:1"])
def test_a_request_of_another_origin_is_refused_however_it_is_written(client, origin):
    assert client.get(f"/?token={TOKEN}", headers={**HOST, "origin": origin}).status_code == 403
