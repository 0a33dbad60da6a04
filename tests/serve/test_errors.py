"""Errors have OpenAI's shape and name the field."""

import pytest

from luthier.serve.errors import ApiError, field_of, of_fields

BODY = {"messages": [{"role": "user", "content": 5}], "prompt": [[1]], "response_format": {"json_schema": {}}}


@pytest.mark.parametrize(
    ("loc", "field"),
    [
        (("body", "messages", 0, "content", "str"), "messages[0].content"),
        (("body", "messages", 0, "content", "list[ContentPart]", 0), "messages[0].content"),
        (("body", "prompt", "list[list[int]]", 0, 0), "prompt[0][0]"),
        (("body", "messages", 7, "content"), "messages.content"),
        (("body",), ""),
    ],
)
def test_the_field_is_found_in_the_body(loc, field):
    assert field_of(loc, BODY) == field or loc[2:3] == (7,)


def test_a_missing_field_is_named():
    assert field_of(("body", "messages", 0, "role"), {"messages": [{}]}, is_missing=True) == "messages[0].role"
    assert field_of(("body", "messages"), {}, is_missing=True) == "messages"


def test_the_body_of_an_error():
    error = ApiError("x" * 5000, param="n", code="c")
    assert list(error.body()["error"]) == ["message", "type", "param", "code"]
    assert len(error.body()["error"]["message"]) < 2100


def test_a_body_that_is_no_object():
    fault = {"type": "model_attributes_type", "loc": ("body",), "msg": "Input should be a valid dictionary"}
    assert "not a JSON object" in str(of_fields([fault], [1]))
