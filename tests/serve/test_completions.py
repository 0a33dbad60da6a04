"""Completions of texts and ids, one or many, with log-probabilities as evaluation harnesses read them."""

import json

import httpx
import openai
import pytest

from luthier.infer.types import Answer, Piece
from tests.serve.fakes import ScriptedEngine, ScriptedTicket, chat_model, serving

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def server():
    model = chat_model(lambda prompt: [f"[{prompt.removeprefix('<s>')}]", "!"])
    with serving(model) as (url, _):
        yield url, model.engine


def post(server, **fields):
    return httpx.post(f"{server[0]}{PATH}", json=fields, timeout=60)


def chunks_of(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_texts_and_ids(server):
    ids = server[1].tokenizer.encode("ab", add_special_tokens=False)
    for prompt in ("ab", ids):
        body = post(server, prompt=prompt).json()
        assert body["object"] == "text_completion" and body["choices"][0]["text"] == "[ab]!"
        assert body["choices"][0]["finish_reason"] == "stop"
    assert post(server, prompt=ids).json()["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
    }


def test_many_prompts_with_several_choices_each(server):
    body = post(server, prompt=["a", "b"], n=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["[a]!", "[a]!", "[b]!", "[b]!"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18}, "a prompt is read once"


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_of_many_prompts_begins_with_its_own(server, stream):
    response = post(server, prompt=["a", "b"], n=2, echo=True, return_token_ids=True, stream=stream)
    texts = dict.fromkeys(range(4), "")
    for body in chunks_of(response) if stream else [response.json()]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == ["a[a]!", "a[a]!", "b[b]!", "b[b]!"]


def test_echo_with_logprobs_as_harnesses_ask_for_it(server):
    ids = server[1].tokenizer.encode("abc", add_special_tokens=False)
    body = post(server, prompt=[ids, ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234).json()
    for choice in body["choices"]:
        found = choice["logprobs"]
        assert found["tokens"][:3] == ["a", "b", "c"] and choice["text"].startswith("abc")
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:3] == [-0.5, -0.5]
        assert max(found["top_logprobs"][1].values()) == -0.5
        assert found["text_offset"][:4] == [0, 1, 2, 3]


def test_the_prompt_alone(server):
    body = post(server, prompt="ab", echo=True, logprobs=0, max_tokens=0).json()
    (choice,) = body["choices"]
    assert choice["text"] == "ab" and len(choice["logprobs"]["tokens"]) == 2
    assert body["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 1}, {"logprobs": 0}], ids=str)
def test_a_stream_adds_up_to_the_whole(server, fields):
    whole = post(server, prompt=["ab", "c"], **fields).json()
    options = {"include_usage": True}
    chunks = chunks_of(post(server, prompt=["ab", "c"], stream=True, stream_options=options, **fields))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine][-1] == choice["finish_reason"]
        if choice["logprobs"]:
            tokens = [token for one in mine if one["logprobs"] for token in one["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


def test_the_offsets_of_a_stream_are_those_of_the_whole():
    """Of a token whose last letters may begin a stop string, the text comes later than the token itself."""

    class Holding(ScriptedEngine):
        def submit(self, prompt_ids, settings, deliver):
            first, second = self._tokens("ab", settings)
            deliver(Piece("", (first,)))
            deliver(Piece("ab", (second,)))
            said = {"text": "ab", "tokens": (first, second), "num_new_tokens": 2, "finish_reason": "length"}
            deliver(Answer(num_prompt_tokens=len(prompt_ids), **said))
            return ScriptedTicket()

    with serving(chat_model(engine=Holding(lambda prompt: []))) as (url, _):
        (whole,) = post((url,), prompt="x", logprobs=0).json()["choices"]
        chunks = chunks_of(post((url,), prompt="x", logprobs=0, stream=True))
    parts = [one["logprobs"] for chunk in chunks for one in chunk["choices"] if one["logprobs"]]
    assert [offset for part in parts for offset in part["text_offset"]] == whole["logprobs"]["text_offset"] == [0, 1]


def test_the_client_of_openai(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="x", max_retries=0) as client:
        assert client.completions.create(model="x", prompt="q").choices[0].text == "[q]!"
        text = "".join(c.choices[0].text for c in client.completions.create(model="x", prompt="q", stream=True))
        assert text == "[q]!"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": [99999]}, "prompt"), ({}, "prompt"), ({"prompt": "x", "suffix": "y"}, "suffix")],
    ids=str,
)
def test_bad_requests(server, fields, param):
    response = post(server, **fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
