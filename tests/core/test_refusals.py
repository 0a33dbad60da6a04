"""A refusal that is cut off is still a refusal, and nothing stays open."""

import io
from email.message import Message
from http.client import IncompleteRead
from urllib.error import HTTPError

import pytest

from luthier.core.refusals import body_of


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
