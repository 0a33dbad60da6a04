"""What a server of rollouts may answer besides answers. Whole runs: tests/workflow/test_served_rollouts.py."""

import json
import signal
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from luthier.core.errors import RunFailed
from luthier.infer.rollout_server import RolloutServer
from luthier.infer.servers.model import Ask
from luthier.infer.types import Settings

ASK = Ask(prompt_ids=[1], settings=Settings(seed=1), num_new_tokens=2, stop_ids={0})


class Handler(BaseHTTPRequestHandler):
    models: ClassVar[object] = {"data": [{"id": "base"}]}
    status: ClassVar[int] = 200
    body: ClassVar[bytes] = b""
    asked: ClassVar[list[tuple[str, object]]] = []

    def log_message(self, *words):
        """Nothing."""

    def do_GET(self):
        self.write(200, json.dumps(self.models).encode())

    def do_POST(self):
        self.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.write(self.status, self.body)

    def write(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    class Own(Handler):
        asked: ClassVar[list[tuple[str, object]]] = []

    http = HTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    found = RolloutServer.at(f"http://127.0.0.1:{http.server_port}", "key")
    yield found, Own
    http.shutdown()
    http.server_close()


def events(*choices):
    return b"".join(f"data: {json.dumps({'choices': [choice]})}\n\n".encode() for choice in choices)


def test_the_tokens_of_all_events_are_the_answer(server):
    found, handler = server
    handler.body = events({"token_ids": [5], "finish_reason": None}, {"token_ids": [0], "finish_reason": "stop"})
    assert found.answers([ASK, ASK]) == [[5, 0], [5, 0]]
    path, body = handler.asked[0]
    assert path == "/v1/completions" and body["model"] == "base" and body["prompt"] == [1] and body["seed"] == 1
    assert "stop" not in body


def test_a_prompt_without_room_is_not_asked(server):
    found, handler = server
    assert found.answers([replace(ASK, num_new_tokens=0)]) == [[]] and not handler.asked


def test_what_comes_after_the_end_does_not_take_it_back(server):
    """Such as the numbers of tokens, of a server that is told to send them."""
    found, handler = server
    last = events({"token_ids": [0], "finish_reason": "stop"})
    handler.body = last + b'data: {"choices": [], "usage": {}}\n\n'
    assert found.answers([ASK]) == [[0]]


def test_new_weights_empty_the_cache_of_prompts(server):
    """It holds keys and values of the weights before."""
    found, handler = server
    found.reload(Path("/w"))
    reload = {"method": "reload_weights", "kwargs": {"weights_path": "/w"}}
    assert handler.asked == [("/collective_rpc", reload), ("/reset_prefix_cache", {})]


def test_a_server_of_this_run_that_has_died_tells_why(server):
    found, handler = server
    handler.status, handler.body = 200, b""
    handler.do_POST = lambda self: None  # it hangs up without a word
    with pytest.raises(RunFailed, match=r"the connection to vLLM at .* broke"):
        found.answers([ASK])
    found.child = SimpleNamespace(ends_within=lambda seconds: True, failure=lambda: RunFailed("status 7"))
    with pytest.raises(RunFailed, match="status 7"):
        found.answers([ASK])


def test_an_address_without_a_port_is_that_of_http(monkeypatch):
    monkeypatch.setattr(RolloutServer, "open", lambda server: None)
    assert [RolloutServer.at(address, "").port for address in ("http://a", "http://a:8000")] == [80, 8000]


def test_stop_strings_go_to_the_server_since_nobody_reads_the_text_here(server):
    found, handler = server
    handler.body = events({"token_ids": [5], "finish_reason": "stop"})
    found.answers([replace(ASK, settings=Settings(stop=("a", "b"), skip_special_tokens=False))])
    ((_, body),) = handler.asked
    assert (body["stop"], body["skip_special_tokens"]) == (["a", "b"], False)


def test_a_signal_that_ends_the_run_does_not_wait_for_an_answer(server):
    found, handler = server
    asked, end, ended = threading.Event(), threading.Event(), []

    def do_POST(self):
        asked.set()
        ended.append(end.wait(60))

    def interrupt():
        asked.wait()
        # As Ctrl-C: to the thread that waits. A signal that another thread raises for itself wakes nobody.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    handler.do_POST = do_POST
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            found.answers([ASK, ASK])
        assert not ended
    finally:
        end.set()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, events({"token_ids": [5], "finish_reason": None}), "broke off an answer"),
        (200, b"data: {}\n\n", "answers in another form"),
        (200, events({"token_ids": [5], "finish_reason": "abort"}), "the answer ended with abort"),
        (200, events("no choice"), "answers in another form"),
        (400, b'{"error": {"message": "too long"}}', "refuses a prompt: too long"),
    ],
)
def test_what_is_no_answer_is_one_sentence(server, status, body, message):
    found, handler = server
    handler.status, handler.body = status, body
    with pytest.raises(RunFailed, match=message):
        found.answers([ASK])


def test_each_adapter_has_a_name_of_its_own_and_the_last_one_goes(server):
    found, handler = server
    found.label = "run"
    for _ in range(2):
        found.load_adapter(Path("/a"))
    assert [path for path, _ in handler.asked] == [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter",
    ]
    assert [body["lora_name"] for _, body in handler.asked] == ["run-1", "run-1", "run-2"] and found.model == "run-2"


def test_an_adapter_that_made_room_for_that_of_another_run_need_not_go(server):
    """vLLM then says `Failed to remove lora adapter`."""
    found, handler = server
    found.load_adapter(Path("/a"))
    post = handler.do_POST

    def do_POST(self):
        self.status = 500 if "unload" in self.path else 200
        post(self)

    handler.do_POST = do_POST
    found.load_adapter(Path("/b"))
    assert found.model == "luthier-2"
    handler.do_POST, handler.status, handler.body = post, 404, b'{"detail": "Not Found"}'
    with pytest.raises(RunFailed, match="has no /v1/unload_lora_adapter"):
        found.load_adapter(Path("/c"))


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (404, "Not Found", "has no /collective_rpc -> start it with VLLM_SERVER_DEV_MODE=1"),
        (404, "No adapter found for /w", "No adapter found for /w -> it must see the folder too: set rollout_folder"),
        (500, "bad file", "does not take the weights of /collective_rpc: bad file$"),
    ],
)
def test_a_server_that_takes_no_weights_says_why(server, status, said, message):
    found, handler = server
    handler.status, handler.body = status, json.dumps({"detail": said}).encode()
    with pytest.raises(RunFailed, match=message):
        found.reload(Path("/w"))


def test_another_program_is_no_server_of_vllm(server):
    found, handler = server
    handler.models = {"error": "who are you?"}
    with pytest.raises(RunFailed, match="not a vLLM server, or it wants another key"):
        found.open()
