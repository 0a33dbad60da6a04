"""What is an address of a server."""

import pytest

from luthier.core.addresses import api_key, is_address
from luthier.core.errors import InvalidInput


@pytest.mark.parametrize(
    "text",
    ["http://host", "https://host:8000/v1/score", "http://127.0.0.1:65535", "http://[::1]:80/v1?version=2", "HTTP://h"],
)
def test_a_server_can_be_asked_there(text):
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "host:80", "ftp://host", "http://", "http:///v1", "http://[::1/v1", "http://host:port/", "http://a b/v1"),
        # Linux would ask port 34463 instead.
        "http://host:99999/v1",
        *("http://host:0", "http://host/\u00e9", "http://host/v1\n", "http://host/?q=\u00fc"),
    ],
)
def test_no_request_can_be_sent_there(text):
    assert not is_address(text)


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("A_KEY", " secret\n")
    assert api_key("A_KEY") == "secret" and api_key("NO_SUCH_KEY") == ""
    monkeypatch.setenv("A_KEY", "secret\nkey")
    with pytest.raises(InvalidInput, match="A_KEY") as caught:
        api_key("A_KEY")
    assert "secret" not in str(caught.value)
