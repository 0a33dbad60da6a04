"""Fields without effect are named in a header and logged once; those that would change the meaning are refused."""

import pytest

from luthier.serve.errors import ApiError
from luthier.serve.fields import IgnoredFields
from luthier.serve.protocol import ChatRequest

HI = {"messages": [{"role": "user", "content": "hi"}]}


def test_each_is_logged_once(said):
    ignored = IgnoredFields()
    for _ in range(3):
        headers = ignored.headers(ChatRequest(**HI, user="me", metadata={}))
    assert headers == {"x-luthier-ignored": "metadata,user"}
    assert len([line for line in said if "user" in line]) == 1
    assert ignored.headers(ChatRequest(**HI)) == {}


def test_a_strange_name_cannot_break_the_header():
    (value,) = IgnoredFields().headers(ChatRequest(**{**HI, "a\r\nx: 1,é": 1, "long" * 100: 2})).values()
    assert value.isascii() and value.isprintable() and " " not in value and value.count(",") == 1


def test_their_number_is_bounded():
    (value,) = IgnoredFields().headers(ChatRequest(**HI, **{f"field{i}": i for i in range(500)})).values()
    assert value.count(",") == 19


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("web_search_options", {"a": 1}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
    ],
)
def test_what_would_change_the_meaning_is_refused(name, value):
    with pytest.raises(ApiError) as caught:
        IgnoredFields().headers(ChatRequest(**HI, **{name: value}))
    assert caught.value.param == name


def test_neutral_values_of_those_are_fine():
    neutral = {"audio": None, "modalities": ["text"], "functions": [], "function_call": "none", "prediction": {}}
    assert IgnoredFields().headers(ChatRequest(**HI, **neutral)) == {}
