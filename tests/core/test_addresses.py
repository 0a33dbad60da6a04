"""What is an address of a server."""

import pytest

from luthier.core.addresses import is_address


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
