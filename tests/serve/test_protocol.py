"""Bodies of requests: types are strict, null is absent, and unknown fields are remembered by name."""

import httpx
import pytest
from pydantic import ValidationError

from luthier.serve.protocol import ChatRequest, CompletionRequest, Tool, extras, plain
from tests.serve.fakes import CALL, chat_model, serving
from tests.serve.odd_requests import ODD, REQUESTS, body_with, paths

HI = {"messages": [{"role": "user", "content": "hi"}]}


def test_null_is_absent():
    fields = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert ChatRequest(**HI, **fields) == ChatRequest(**HI, **fields)
    assert ChatRequest(**HI, **fields).temperature is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "0.5"},
        {"temperature": True},
        {"temperature": float("nan")},
        {"n": 1.0},
        {"stream": "true"},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": ""},
        {"seed": 2**63},
        {"logit_bias": {"5": 101}},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": 5}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": [{"type": "search", "function": {"name": "x"}}]},
        {"response_format": "json"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_or_range_is_refused(wrong):
    with pytest.raises(ValidationError):
        ChatRequest(**{**HI, **wrong})


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2], [[1, 2], [3]]], ids=str)
def test_prompts_are_texts_or_ids_one_or_many(prompt):
    assert CompletionRequest(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1.5], [-1], None, {}], ids=str)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValidationError):
        CompletionRequest(prompt=prompt)


def test_unknown_fields_are_named():
    request = ChatRequest(**HI, user="me", stream_options={"include_usage": True, "include_obfuscation": False})
    assert set(extras(request)) == {"user", "stream_options.include_obfuscation"}
    request = ChatRequest(**HI, chat_template_kwargs={"enable_thinking": True, "tone": "dry"})
    assert list(extras(request)) == ["chat_template_kwargs.tone"]


def test_a_tool_keeps_the_order_of_its_keys():
    function = {"parameters": {"type": "object"}, "x": 1, "name": "f"}
    assert list(Tool(type="function", function=function).function.as_given) == ["parameters", "x", "name"]


def test_half_a_surrogate_pair_is_refused_wherever_it_is():
    for value in ("\ud800", {"a": ["\ud800"]}, {"\ud800": 1}):
        with pytest.raises(ValueError, match="surrogate"):
            plain(value)
    assert plain({"a": ["\N{GRINNING FACE}", 1, None]})


def test_a_body_that_is_nested_too_deeply_is_refused():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested"):
        plain(deep)


@pytest.mark.parametrize("name", REQUESTS)
def test_no_value_of_any_field_is_a_fault_of_the_server(name):
    """It would be status 500 or `server_error`, and a place in the queue that is never given back."""
    path, body = REQUESTS[name]
    with serving(chat_model(lambda prompt: [CALL])) as (url, service), httpx.Client(base_url=url, timeout=60) as client:
        statuses = set()
        for place in [*paths(body), ("unknown",)]:
            for value in ODD:
                content = body_with(body, place, value)
                answer = client.post(path, content=content, headers={"content-type": "application/json"})
                where = f"{place}: {content[:300]}: {answer.text[:300]}"
                assert answer.status_code in (200, 400, 405) and "server_error" not in answer.text, where
                assert answer.status_code == 200 or set(answer.json()["error"]) >= {"message", "param"}, where
                statuses.add(answer.status_code)
        assert statuses >= {200, 400}
        assert service.admission.num_answers == 0 and not service.model.fault
