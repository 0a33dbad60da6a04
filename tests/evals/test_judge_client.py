"""Requests to a judge, against a real server."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from luthier.core.errors import InvalidInput, RunFailed
from luthier.evals.judge_client import NUM_ATTEMPTS, JudgeClient
from tests.evals.judge_server import judge_server, says

MESSAGES = [{"role": "user", "content": "which?"}]


def client_of(server, **options):
    return JudgeClient(server.url, "judge-1", pause_seconds=0, **options)


def test_the_request_is_openais(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with judge_server(lambda count, body: says("first")) as server:
        assert client_of(server).ask(MESSAGES) == "first"
        assert JudgeClient(server.url + "/chat/completions", "judge-1").ask(MESSAGES) == "first"
        assert JudgeClient(server.url + "/?api-version=2#x", "judge-1").ask(MESSAGES) == "first"
        assert JudgeClient(server.url + "/chat/completions?a=1", "judge-1").ask(MESSAGES) == "first"
    assert server.requests[2][0] == "/v1/chat/completions?api-version=2"
    assert server.requests[3][0] == "/v1/chat/completions?a=1"
    path, headers, body = server.requests[0]
    assert server.requests[1][0] == path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    assert body == {"model": "judge-1", "messages": MESSAGES, "temperature": 0}


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "for another server")
    with judge_server(lambda count, body: says("tie")) as server:
        client_of(server).ask(MESSAGES)
    assert "authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    "fault",
    [(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}), (503, b"busy", {}), (200, b"no JSON", {})],
)
def test_what_may_pass_is_tried_again(fault):
    with judge_server(lambda count, body: fault if count < 2 else says("second")) as server:
        assert client_of(server).ask(MESSAGES) == "second"
    assert len(server.requests) == 3


def test_a_fault_that_stays_ends_the_run():
    with (
        judge_server(lambda count, body: (500, {"error": {"message": "out of memory"}}, {})) as server,
        pytest.raises(RunFailed, match=r"no answer after 5 attempts \(status 500: out of memory\).*same command"),
    ):
        client_of(server).ask(MESSAGES)
    assert len(server.requests) == NUM_ATTEMPTS


def test_a_page_in_the_place_of_an_answer_is_shown():
    with (
        judge_server(lambda count, body: (200, b"<html>", {})) as server,
        pytest.raises(RunFailed, match=r"\(the response is not JSON, it begins with '<html>'\)"),
    ):
        client_of(server).ask(MESSAGES)


def test_nobody_listens():
    with socket.socket() as bound:  # so nobody else gets this port
        bound.bind(("127.0.0.1", 0))
        client = JudgeClient(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", "judge-1", pause_seconds=0)
        with pytest.raises(RunFailed, match=r"Connection refused"):
            client.ask(MESSAGES)


def test_a_server_that_is_too_slow():
    has_given_up = threading.Event()

    def slow(count, body):
        has_given_up.wait()
        return says("first")

    with judge_server(slow) as server:
        with pytest.raises(RunFailed, match="timed out"):
            client_of(server, timeout_seconds=0.02).ask(MESSAGES)
        has_given_up.set()


@pytest.mark.parametrize(
    ("status", "headers", "remedy"),
    [
        (401, {}, "environment variable JUDGE_API_KEY"),
        (404, {}, "check judge_url and judge_model"),
        (307, {"Location": "https://elsewhere/v1"}, "name the address that it redirects to: https://elsewhere/v1"),
    ],
)
def test_what_the_user_must_correct_is_said_at_once(status, headers, remedy):
    with (
        judge_server(lambda count, body: (status, {"error": {"message": "no"}}, headers)) as server,
        pytest.raises(InvalidInput, match=remedy),
    ):
        client_of(server).ask(MESSAGES)
    assert len(server.requests) == 1


def test_a_model_without_temperature():
    refused = (400, {"error": {"message": "unsupported", "param": "temperature"}}, {})
    with judge_server(lambda count, body: refused if "temperature" in body else says("tie")) as server:
        client = client_of(server)
        assert [client.ask(MESSAGES), client.ask(MESSAGES)] == ["tie", "tie"]
    assert len(server.requests) == 3


def test_requests_that_were_under_way_when_one_was_refused_its_temperature():
    """Eight threads ask a judge of which none knows yet that it takes no temperature."""
    refused = (400, {"error": {"message": "unsupported", "param": "temperature"}}, {})
    together = threading.Barrier(8)

    def answer(count, body):
        if "temperature" not in body:
            return says("tie")
        together.wait(120)
        return refused

    with judge_server(answer) as server, ThreadPoolExecutor(8) as threads:
        client = client_of(server)
        assert list(threads.map(client.ask, [MESSAGES] * 8)) == ["tie"] * 8


def test_a_refusal_that_is_cut_off_is_tried_again():
    cut = (503, b"bus", {"Content-Length": "100", "Connection": "close"})
    with judge_server(lambda count, body: cut if count < 1 else says("second")) as server:
        assert client_of(server).ask(MESSAGES) == "second"


def test_a_key_is_never_shown(monkeypatch, said):
    """A line break inside is refused by http.client, whose message quotes the header."""
    monkeypatch.setenv("JUDGE_API_KEY", "secret\nkey")
    with judge_server(lambda count, body: says("first")) as server:
        with pytest.raises(InvalidInput, match="JUDGE_API_KEY: it has a character") as caught:
            client_of(server).ask(MESSAGES)
        monkeypatch.setenv("JUDGE_API_KEY", "secret\n")
        assert client_of(server).ask(MESSAGES) == "first"
    assert "secret" not in str(caught.value) + "".join(said)
    assert server.requests[0][1]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("content", [{"choices": []}, {"scores": [1]}, [1], {"choices": [{"message": {"content": 3}}]}])
def test_a_response_that_is_no_chat_completion(content):
    with (
        judge_server(lambda count, body: (200, content, {})) as server,
        pytest.raises(RunFailed, match="is not a chat completion"),
    ):
        client_of(server).ask(MESSAGES)


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": None, "refusal": "no"}},
        {"message": {"content": "The first answer says that"}, "finish_reason": "length"},
    ],
)
def test_what_ends_before_its_verdict_is_an_empty_answer(choice):
    content = {"choices": [choice]}
    with judge_server(lambda count, body: (200, content, {})) as server:
        assert client_of(server).ask(MESSAGES) == ""


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "http://h:99999", "ftp://host/v1", "http://", "https://me:secret@host/v1"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(InvalidInput, match="judge_url") as caught:
        JudgeClient(url, "judge-1")
    assert "secret" not in str(caught.value)
