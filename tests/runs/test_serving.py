"""The server under strange requests and under load: never a 500, no answer lost or mixed up, nothing left behind."""

import asyncio
import json
import random
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, ScoreRequest, TokenizeRequest
from tests.serve.fakes import chat_model, serving
from tests.serve.process import api
from tests.tiny import tiny_llama
from tests.waiting import until

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ROUTES = {
    CHAT: (ChatRequest, {"messages": HI}),
    TEXT: (CompletionRequest, {"prompt": "hi"}),
    "/v1/score/evaluation": (ScoreRequest, {"messages": ["hi"]}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
NUM_CLIENTS, NUM_REQUESTS = 32, 600
MAX_GROWTH_BYTES = 30 * 2**20

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.floats(0, 2),
    st.text(max_size=8),
    st.sampled_from(["user", "assistant", "tool", "system", "function", "text", "json_object", "auto", "required"]),
)
KEYS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["role", "content", "type", "function", "name", "tool_calls", "arguments", "schema", "text", "7"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])},
    optional={
        "content": st.one_of(VALUES, st.text(max_size=20)),
        "tool_calls": VALUES,
        "tool_call_id": SCALARS,
        "name": SCALARS,
        "reasoning_content": st.text(max_size=5),
    },
)
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.text(max_size=5)}, optional={"parameters": VALUES}),
    }
)


@st.composite
def requests(draw) -> tuple[str, Any]:
    """(path, body): a good body with some fields replaced, added or removed, or anything at all."""
    path = draw(st.sampled_from(list(ROUTES)))
    model, good = ROUTES[path]
    if draw(st.integers(0, 9)) == 0:
        return path, draw(VALUES)
    body = dict(good)
    if path == CHAT and draw(st.booleans()):
        body["messages"] = draw(st.lists(MESSAGE, max_size=4))
    if path == CHAT and draw(st.booleans()):
        body["tools"] = draw(st.lists(TOOL, max_size=2))
    names = st.sampled_from([field.alias or name for name, field in model.model_fields.items()]) | KEYS
    for name in draw(st.lists(names, max_size=4)):
        body[name] = draw(VALUES)
    return path, body


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 405), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.fixture(scope="module")
def fuzzed():
    with serving(chat_model(num_positions=300)) as (url, service), httpx.Client(base_url=url, timeout=60) as client:
        yield client
        until(lambda: service.admission.num_answers == 0)


def test_no_request_makes_the_server_fail(fuzzed):
    _fuzz(fuzzed, 150)


@pytest.mark.thorough
def test_no_request_of_many_makes_the_server_fail(fuzzed):
    _fuzz(fuzzed, 1500)


def _fuzz(client: httpx.Client, num_examples: int) -> None:
    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(request=requests())
    def run(request) -> None:
        path, body = request
        data = json.dumps(body).encode()
        check(client.post(path, content=data, headers={"content-type": "application/json"}))

    run()


@pytest.mark.thorough
def test_many_clients_for_a_while(tmp_path):
    """Every kind of request, 32 at a time. What must not change: seeded answers, memory, threads and open files."""
    folder = tiny_llama(tmp_path / "model", max_position_embeddings=1024)
    keys = {"model_name_or_path": str(folder), "template": "qwen", "max_new_tokens": 24}
    with api(tmp_path, keys, API_MAX_QUEUE="1000") as (url, started):
        process = psutil.Process(started.process.pid)
        soak = Soak(url)
        asyncio.run(soak.learn())
        asyncio.run(soak.run(NUM_REQUESTS // 4))  # buffers and caches reach their size
        before = _held(process, url)
        asyncio.run(soak.run(NUM_REQUESTS))
        assert soak.faults == []
        after = _held(process, url)
        assert after["memory"] - before["memory"] < MAX_GROWTH_BYTES
        assert after["threads"] <= before["threads"] and after["files"] <= before["files"]
        assert started.stop() == 0


def _held(process: psutil.Process, url: str) -> dict[str, int]:
    """What the server holds when it is idle and all connections are closed."""
    until(lambda: "luthier_requests_running 0" in httpx.get(f"{url}/metrics", timeout=60).text)
    until(lambda: {connection.status for connection in process.net_connections()} == {psutil.CONN_LISTEN})
    return {
        "memory": process.memory_info().rss,
        "threads": process.num_threads(),
        "files": len(process.net_connections()) + process.num_fds(),
    }


class Soak:
    """Clients that check what they get against answers to the same prompts alone."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.expected: dict[str, list[str]] = {}
        """Word -> three answers to it."""
        self.faults: list[str] = []
        self.kinds = (self.whole, self.stream, self.leave, self.bad, self.call, self.ids, self.long, self.several)

    async def learn(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            for word in ("one", "two", "three", "four", "five", "six"):
                self.expected[word] = _texts(await self._ask(client, word, n=3))
        assert len({text for texts in self.expected.values() for text in texts}) == 18

    async def run(self, num_requests: int) -> None:
        todo = list(range(num_requests))
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            await asyncio.gather(*(self._client(client, todo) for _ in range(NUM_CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, todo: list[int]) -> None:
        while todo:
            number = todo.pop()
            word = random.Random(number).choice(sorted(self.expected))
            kind = self.kinds[number % len(self.kinds)]
            try:
                if not await kind(client, word):
                    self.faults.append(f"{number}: {kind.__name__} {word}")
            except (httpx.HTTPError, KeyError, ValueError) as fault:
                self.faults.append(f"{number}: {kind.__name__} {word}: {fault!r}")

    def _body(self, word: str, **fields: Any) -> dict[str, Any]:
        chosen = {"temperature": 1.0, "top_p": 1.0, "seed": len(word) + 100 * ord(word[0]), "ignore_eos": True}
        return {"messages": [{"role": "user", "content": word}], **chosen, **fields}

    async def _ask(self, client: httpx.AsyncClient, word: str, **fields: Any) -> dict[str, Any]:
        response = await client.post(CHAT, json=self._body(word, **fields))
        assert response.status_code == 200, response.text
        return response.json()

    async def whole(self, client: httpx.AsyncClient, word: str) -> bool:
        return _texts(await self._ask(client, word)) == self.expected[word][:1]

    async def stream(self, client: httpx.AsyncClient, word: str) -> bool:
        written, ends = "", 0
        async with client.stream("POST", CHAT, json=self._body(word, stream=True)) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ends += 1
                elif line.startswith("data: "):
                    written += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return ends == 1 and written == self.expected[word][0]

    async def leave(self, client: httpx.AsyncClient, word: str) -> bool:
        async with client.stream("POST", CHAT, json=self._body(word, stream=True, max_tokens=500)) as response:
            async for line in response.aiter_lines():
                if line:
                    break
        return True

    async def bad(self, client: httpx.AsyncClient, word: str) -> bool:
        response = await client.post(CHAT, json=self._body(word, top_p=7))
        return response.status_code == 400 and response.json()["error"]["param"] == "top_p"

    async def call(self, client: httpx.AsyncClient, word: str) -> bool:
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
        tool = {"type": "function", "function": {"name": word, "parameters": {**schema, "additionalProperties": False}}}
        fields = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 150, "ignore_eos": False}
        (choice,) = (await self._ask(client, word, tools=[tool], **fields))["choices"]
        (made,) = choice["message"]["tool_calls"]
        return made["function"]["name"] == word and json.loads(made["function"]["arguments"])["n"] in (1, 2)

    async def ids(self, client: httpx.AsyncClient, word: str) -> bool:
        ids = list(word.encode())
        response = await client.post(TEXT, json={"prompt": [ids, ids], "echo": True, "logprobs": 1, "max_tokens": 1})
        first, second = response.json()["choices"]
        size = len(ids)
        close = zip(
            first["logprobs"]["token_logprobs"][1:size], second["logprobs"]["token_logprobs"][1:size], strict=True
        )
        return all(abs(a - b) < 1e-3 for a, b in close)

    async def long(self, client: httpx.AsyncClient, word: str) -> bool:
        body = await self._ask(client, word * 100, max_tokens=8)
        return body["usage"]["completion_tokens"] == 8

    async def several(self, client: httpx.AsyncClient, word: str) -> bool:
        return _texts(await self._ask(client, word, n=3)) == self.expected[word]


def _texts(body: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in body["choices"]]
