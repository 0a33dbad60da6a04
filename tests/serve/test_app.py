"""Every bad request is answered in OpenAI's shape, with the field at fault; the small routes; a full queue."""

import json
import threading
from dataclasses import replace

import httpx
import openai
import pytest

from luthier.serve.fetching import NotFetched
from luthier.serve.images import ImageRules
from tests.serve.fakes import WEATHER, chat_model, serving
from tests.waiting import until

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/absent"}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]
NO_NAME = {"type": "function", "function": {"parameters": {}}}
ABSENT = {"type": "function", "function": {"name": "absent"}}
BAD_FIELDS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [*HI, *HI]}, "messages"),
    ({"messages": IMAGE}, "messages[0].content[0]"),
    ({"messages": HI, "temperature": -1}, "temperature"),
    ({"messages": HI, "temperature": "x"}, "temperature"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HI, "n": 0}, "n"),
    ({"messages": HI, "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens"),
    ({"messages": HI, "max_tokens": -5}, "max_tokens"),
    ({"messages": HI, "top_p": 7}, "top_p"),
    ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": HI, "tools": [NO_NAME]}, "tools[0].function.name"),
    ({"messages": HI, "tools": [WEATHER], "tool_choice": ABSENT}, "tool_choice"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
    ({"messages": HI, "response_format": SCHEMA}, "response_format.json_schema.schema"),
    ({"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": HI, "logit_bias": {"9999": 1}}, "logit_bias"),
    ({"messages": HI, "presence_penalty": 3}, "presence_penalty"),
    ({"messages": HI, "functions": [{"name": "f"}]}, "functions"),
    ({"messages": HI, "audio": {"voice": "x"}}, "audio"),
    ({"messages": HI, "prediction": {"content": "x"}}, "prediction"),
    ({"messages": HI, "web_search_options": {"a": 1}}, "web_search_options"),
    ({"messages": HI, "chat_template_kwargs": {"enable_thinking": "x"}}, "chat_template_kwargs.enable_thinking"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
]


@pytest.fixture(scope="module")
def server():
    model = chat_model()
    with serving(model, keys=("secret", "other")) as (url, service):
        yield url, service, model.engine


def post(server, path=CHAT, **options):
    headers = {"Authorization": "Bearer secret", **options.pop("headers", {})}
    return httpx.post(f"{server[0]}{path}", headers=headers, timeout=60, **options)


def get(server, path, key="secret"):
    return httpx.get(f"{server[0]}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=60)


def error_of(response, status=400):
    assert response.status_code == status, response.text
    (key,) = response.json()
    assert key == "error" and list(response.json()["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text and response.headers["x-request-id"]
    return response.json()["error"]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=str)
def test_the_field_at_fault_is_named(server, fields, param):
    error = error_of(post(server, content=json.dumps(fields), headers={"content-type": "application/json"}))
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param is None or param.partition("[")[0].partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": list("abcde")}, "stop: List should have at most 4 items after validation, not 5"),
        ({"stop": ["a", ""]}, "stop[1]: String should have at least 1 character"),
        ({"stop": 5}, "stop: Input should be a valid string"),
        ({"stop": 5, "stop_token_ids": [-1]}, "stop: Input should be a valid string"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: this field is required"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages[0].content[0].type: this field is req",
        ),
    ],
    ids=str,
)
def test_of_a_field_of_several_kinds_the_fault_is_of_the_one_that_was_meant(server, fields, message):
    assert error_of(post(server, json={"messages": HI, **fields}))["message"].startswith(message)


@pytest.mark.parametrize("body", [b"", b"{", b"hello", b"[]", b"5", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_body_that_is_no_json_object(server, body):
    error_of(post(server, content=body, headers={"content-type": "application/json"}))


def test_a_number_of_too_many_digits_is_named(server):
    body = json.dumps({"messages": HI, "seed": 0}).replace('"seed": 0', '"seed": ' + "1" * 5000)
    error = error_of(post(server, content=body, headers={"content-type": "application/json"}))
    assert "cannot be read as JSON" in error["message"]


def test_a_body_without_its_content_type(server):
    assert "application/json" in error_of(post(server, content=json.dumps({"messages": HI})))["message"]


def test_a_body_of_50_mb(server):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 50_000_000}]})
    error = error_of(post(server, content=body, headers={"content-type": "application/json"}), 413)
    assert "bytes" in error["message"]


def test_a_prompt_that_is_too_long_names_both_numbers(server):
    error = error_of(post(server, json={"messages": [{"role": "user", "content": "x" * 5000}]}))
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert "5" in error["message"] and "4096" in error["message"]


@pytest.mark.parametrize("key", ["wrong", "secre", "sécret"])
def test_a_wrong_key(server, key):
    error = error_of(post(server, json={"messages": HI}, headers={"Authorization": f"Bearer {key}".encode()}), 401)
    assert error["code"] == "invalid_api_key"


def test_each_key_of_the_list_opens_and_health_needs_none(server):
    assert get(server, "/v1/models", "other").status_code == 200
    assert httpx.get(f"{server[0]}/v1/models", timeout=60).status_code == 401
    assert httpx.get(f"{server[0]}/metrics", timeout=60).status_code == 401
    assert httpx.get(f"{server[0]}/health", timeout=60).status_code == 200
    assert httpx.get(f"{server[0]}/docs", timeout=60).status_code == 200


def test_the_error_class_of_openai(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.NotFoundError):
            client.with_options(api_key="secret").embeddings.create(model="x", input="y")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/nothing", "/", "/v1/audio/speech"])
def test_what_is_not_there(server, path):
    assert path in error_of(post(server, path, json={}), 404)["message"]


def test_a_wrong_method(server):
    error_of(get(server, CHAT), 405)
    error_of(post(server, "/v1/models", json={}), 405)


def test_the_models(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "luthier"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("else/where")
        assert caught.value.code == "model_not_found"


def test_scoring_is_for_reward_models(server):
    error_of(post(server, "/v1/score/evaluation", json={"messages": ["x"]}), 405)


def test_tokens(server):
    found = post(server, "/tokenize", json={"prompt": "ab"}).json()
    assert found["count"] == 2 and found["max_model_len"] == 4096
    assert post(server, "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "ab"}
    chat = post(server, "/tokenize", json={"messages": HI}).json()["tokens"]
    post(server, json={"messages": HI})
    assert server[2].tokenizer.decode(chat) == server[2].prompts[-1]
    assert error_of(post(server, "/detokenize", json={"tokens": [1, 99999]}))["param"] == "tokens[1]"
    assert error_of(post(server, "/tokenize", json={}))["param"] == "prompt"


def test_request_ids(server):
    assert post(server, json={"messages": HI}, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert post(server, json={"messages": HI}, headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_metrics(server):
    post(server, json={"messages": HI})
    text = get(server, "/metrics").text
    assert "luthier_requests_running 0" in text and "luthier_requests_waiting 0" in text
    assert 'luthier_requests_total{route="/v1/chat/completions",status="200"}' in text


def test_openapi_describes_the_requests(server):
    schema = httpx.get(f"{server[0]}/openapi.json", timeout=60).json()
    assert set(schema["paths"]) >= {CHAT, "/v1/completions", "/v1/models", "/v1/score/evaluation", "/health"}
    assert "temperature" in schema["components"]["schemas"]["ChatRequest"]["properties"]


def test_while_the_model_is_loading():
    with serving(None) as (url, _):
        for response in (
            httpx.get(f"{url}/health", timeout=60),
            httpx.post(f"{url}{CHAT}", json={"messages": HI}, timeout=60),
        ):
            error = error_of(response, 503)
            assert error["type"] == "unavailable_error"
        assert "luthier_ready 0" in httpx.get(f"{url}/metrics", timeout=60).text


def test_a_full_queue():
    gate = threading.Event()
    with serving(chat_model(lambda prompt: [gate, "ok"]), max_concurrent=1, max_queue=1) as (url, service):
        answers: list[httpx.Response] = []
        ask = lambda: answers.append(httpx.post(f"{url}{CHAT}", json={"messages": HI}, timeout=60))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: service.admission.num_answers == 2)
        assert "luthier_requests_waiting 1" in httpx.get(f"{url}/metrics", timeout=60).text
        response = httpx.post(f"{url}{CHAT}", json={"messages": HI}, timeout=60)
        assert error_of(response, 503)["code"] == "server_overloaded"
        assert response.headers["retry-after"].isdigit()
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_web_pages_of_other_origins():
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with serving(chat_model()) as (url, _):
        assert "access-control-allow-origin" not in httpx.options(f"{url}{CHAT}", headers=asked, timeout=60).headers
    with serving(chat_model(), cors_origins=("http://page",), keys=("k",)) as (url, _):
        allowed = httpx.options(f"{url}{CHAT}", headers=asked, timeout=60).headers
        assert allowed["access-control-allow-origin"] == "http://page"
        assert allowed.get("access-control-allow-credentials") != "true"


def test_a_proxy_may_put_a_path_before_it():
    with serving(chat_model(), root_path="/proxy", keys=("k",)) as (url, _):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert httpx.get(f"{url}/proxy/health", timeout=60).status_code == 200
        assert httpx.get(f"{url}/openapi.json", timeout=60).json()["servers"] == [{"url": "/proxy"}]


@pytest.mark.parametrize("stream", [False, True])
def test_what_people_write_is_logged_on_request_only(said, stream):
    body = {"messages": [{"role": "user", "content": "secret words"}], "stream": stream, "n": 2}
    for verbose, count in ((False, 0), (True, 2)):
        said.clear()
        with serving(chat_model(lambda prompt: ["o", "k"]), is_verbose=verbose) as (url, _):
            httpx.post(f"{url}{CHAT}", json=body, timeout=60)
        assert len([line for line in said if "secret words" in line or line.count('"ok"') == 2]) == count


def test_an_engine_that_has_died_is_no_healthy_server():
    model = chat_model()
    with serving(model) as (url, _):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        model.engine.fault = "vllm ended with status 7"
        response = httpx.get(f"{url}/health", timeout=60)
    error = {"message": "vllm ended with status 7", "type": "unavailable_error", "param": None, "code": "engine_ended"}
    assert (response.status_code, response.json()) == (503, {"error": error})


def test_200_idle_streams_cost_little():
    import asyncio

    import psutil

    gate = threading.Event()
    with serving(chat_model(lambda prompt: [gate, "ok"]), max_queue=1000) as (url, service):

        async def open_all() -> int:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=60) as client:
                body = {"messages": HI, "stream": True}
                requests = [client.build_request("POST", f"{url}{CHAT}", json=body) for _ in range(200)]
                responses = await asyncio.gather(*(client.send(one, stream=True) for one in requests))
                used = psutil.Process().memory_info().rss
                gate.set()
                texts = [(await one.aread()).decode() for one in responses]
                assert all(text.endswith("data: [DONE]\n\n") for text in texts)
                return used

        before = psutil.Process().memory_info().rss
        # The clients and the threads of the fake model are part of this process, so this is an upper bound.
        assert asyncio.run(open_all()) - before < 50 * 2**20
        until(lambda: service.admission.num_answers == 0)


def test_nobody_else_waits_for_an_image_that_comes_slowly():
    asked, comes = threading.Event(), threading.Event()

    def fetch(url: str, most: int) -> bytes:
        asked.set()
        assert comes.wait(60)
        raise NotFetched("it has gone")

    slow = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
    model = replace(chat_model(), images=ImageRules(allows_urls=True, fetch=fetch))
    with serving(model) as (url, _):
        waiting = [
            threading.Thread(target=lambda path=path: found.append(httpx.post(url + path, json={"messages": slow})))
            for path in (CHAT, "/tokenize")
        ]
        found: list[httpx.Response] = []
        for thread in waiting:
            thread.start()
        assert asked.wait(60)
        assert httpx.post(url + CHAT, json={"messages": HI}).status_code == 200
        assert not found
        comes.set()
        for thread in waiting:
            thread.join()
    for response in found:
        assert response.status_code == 400 and "cannot be fetched: it has gone" in response.text
    assert len(found) == 2
