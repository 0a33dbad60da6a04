"""Scores of texts over HTTP, as the reference's clients ask for them."""

import httpx
import pytest

from luthier.core.errors import DeviceFailed, RunFailed
from luthier.serve.model import RewardModel
from luthier.serve.token_texts import TokenTexts
from luthier.training.rewards import Answered
from luthier.training.rewards.server import RewardServer
from tests.serve.fakes import serving
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def server():
    with serving(judge(lambda texts: [float(len(ids)) for ids in texts])) as (url, _):
        yield url


def judge(scores):
    tokenizer = byte_tokenizer()
    return RewardModel(
        name="judge",
        tokenizer=tokenizer,
        texts=TokenTexts(tokenizer),
        num_positions=8,
        vocab_size=320,
        created=1,
        scores=scores,
    )


def post(server, **fields):
    return httpx.post(f"{server}/v1/score/evaluation", json=fields, timeout=60)


def test_scores(server):
    body = post(server, model="any", messages=["ab", "abc"]).json()
    assert body["scores"] == [2.0, 3.0] and body["object"] == "score.evaluation" and body["model"] == "judge"


def test_a_failed_device_makes_the_server_unhealthy():
    def fails(texts):
        raise DeviceFailed("cuda:0 has failed")

    with serving(judge(fails)) as (url, _):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        for response in (post(url, messages=["ab"]), httpx.get(f"{url}/health", timeout=60)):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_ended")


def test_long_texts_are_cut(server):
    assert post(server, messages=["x" * 20]).json()["scores"] == [8.0]
    assert post(server, messages=["x" * 20], max_length=5).json()["scores"] == [5.0]


@pytest.mark.parametrize(
    ("messages", "param"), [([], "messages"), ("x", "messages"), (["a", ""], "messages[1]"), ([5], "messages[0]")]
)
def test_bad_requests(server, messages, param):
    response = post(server, messages=messages)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_answers_are_for_chat_models(server):
    for path in ("chat/completions", "completions"):
        fields = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}
        assert httpx.post(f"{server}/v1/{path}", json=fields, timeout=60).status_code == 405
    assert httpx.post(f"{server}/tokenize", json={"prompt": "ab"}, timeout=60).json()["count"] == 2


def test_training_can_ask_this_server_for_rewards(server):
    reward = RewardServer(f"{server}/v1/score/evaluation")
    kept = {"prompt_ids": [1], "answer_ids": [2], "prompt": "", "answer": "", "given": "", "stopped": True}
    assert reward([Answered(text=text, **kept) for text in ("a", "abcd")]) == [1.0, 4.0]


def test_training_brings_the_key_that_this_server_asks_for(monkeypatch):
    kept = {"prompt_ids": [1], "answer_ids": [2], "prompt": "", "answer": "", "given": "", "stopped": True}
    with serving(judge(lambda texts: [1.0 for _ in texts]), keys=("secret",)) as (url, _):
        reward = RewardServer(f"{url}/v1/score/evaluation")
        monkeypatch.delenv("REWARD_API_KEY", raising=False)
        with pytest.raises(RunFailed, match=r"status 401: .* environment variable REWARD_API_KEY"):
            reward([Answered(text="a", **kept)])
        monkeypatch.setenv("REWARD_API_KEY", "secret")
        assert reward([Answered(text="a", **kept)]) == [1.0]
