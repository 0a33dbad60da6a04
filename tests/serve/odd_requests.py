"""Full requests, and values of which each can stand in each of their fields, at any depth."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from tests.serve.fakes import WEATHER


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = {"properties": [value]}
    return value


NUMBERS = {"NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000}
"""What Python's json cannot write, or reads back in another way."""
ODD = [
    *(None, True, 0, -1, 0.5, 2**31, 2**63, 1e308, *sorted(NUMBERS)),
    *("", "x", "\ud800", "\ufdd0", "\0", "a" * 5000),
    *([], [[]], [None], [0], ["x"], [{}], {}, {"": ""}, {"type": "object"}, {"x": None}, nested(45), nested(300)),
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}, "required": ["a"]}
CALLS = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": 1}'}}]
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
    {"role": "assistant", "content": "x", "tool_calls": CALLS, "reasoning_content": "r"},
    {"role": "tool", "content": "rain", "tool_call_id": "a"},
]
SHARED = {"model": "m", "temperature": 0.5, "top_p": 0.5, "top_k": 5, "seed": 1, "n": 1, "stop": ["x"], "min_p": 0.1}
SHARED |= {"logit_bias": {"5": 1}, "stream": True, "stream_options": {"include_usage": True}, "stop_token_ids": [1]}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        {**SHARED, "messages": MESSAGES, "tools": [WEATHER], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2}
        | {"max_tokens": 5, "chat_template_kwargs": {"enable_thinking": True}, "user": "u", "function_call": "none"},
    ),
    "schema": (
        "/v1/chat/completions",
        {"messages": MESSAGES[:2], "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    "forced": (
        "/v1/chat/completions",
        {"messages": MESSAGES[:2], "tools": [WEATHER], "tool_choice": {"type": "function", "function": WEATHER}},
    ),
    "continued": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        | {"continue_final_message": True},
    ),
    "completion": ("/v1/completions", {**SHARED, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, "best_of": 1}),
    "tokenize": ("/tokenize", {"messages": MESSAGES, "tools": [WEATHER], "add_special_tokens": True}),
    "detokenize": ("/detokenize", {"tokens": [1, 2]}),
}


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*before, key)
        yield from paths(one, (*before, key))


def body_with(body: Any, path: tuple[Any, ...], value: Any) -> str:
    changed = copy.deepcopy(body)
    *outer, last = path
    place = changed
    for key in outer:
        place = place[key]
    place[last] = value
    text = json.dumps(changed)
    return text.replace(json.dumps(value), value) if isinstance(value, str) and value in NUMBERS else text
