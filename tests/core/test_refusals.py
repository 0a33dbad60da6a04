"""A refusal that is cut off is still a refusal, nothing stays open, and what is not JSON is shown."""

import io
from email.message import Message
from http.client import IncompleteRead
from urllib.error import HTTPError

import pytest

from luthier.core.refusals import body_of, json_of


class Cut(io.BytesIO):
    """What urllib reads from when the server goes away."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def read(self, *args):
        raise self.fault


def refusal(content):
    return HTTPError("http://host", 503, "busy", Message(), content)


@pytest.mark.parametrize(
    ("content", "body"),
    [(io.BytesIO(b"out of memory"), b"out of"), (Cut(IncompleteRead(b"out")), b"out"), (Cut(TimeoutError()), b"")],
)
def test_what_came_of_it(content, body):
    assert body_of(refusal(content), 6) == body
    assert content.closed


@pytest.mark.parametrize("body", [b"<html>hi</html>", b"", b"\xff<html>"])
def test_a_body_that_is_not_json_is_shown(body):
    begins = body.decode(errors="replace")
    with pytest.raises(ValueError, match=f"not JSON, it begins with '{begins}'"):
        json_of(body)
    assert json_of(b'{"scores": [1]}') == {"scores": [1]}
