"""The server from its socket to its end: signals, running answers, a model that cannot be loaded."""

import asyncio
import os
import signal
import socket
import threading

import httpx
import pytest

from luthier.core.errors import DeviceFailed, ModelError, OutputError, RunFailed
from luthier.serve.app import build
from luthier.serve.options import ServerOptions
from luthier.serve.server import Running, listening_socket
from tests.serve.fakes import chat_model
from tests.waiting import until

HI = [{"role": "user", "content": "hi"}]


class Started:
    """A server in the main thread, and what a thread beside it does to it."""

    def __init__(self, load, drain_seconds=600.0):
        options = ServerOptions(host="127.0.0.1", port=0)
        app, self.service = build(options)
        self.running = Running(app, self.service, options, load)
        self.running.drain_seconds = drain_seconds
        self.socket = listening_socket(options)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def run(self, beside) -> int:
        thread = threading.Thread(target=beside, args=(self,))
        thread.start()
        try:
            return self.running.run(self.socket)
        finally:
            thread.join()

    def wait(self) -> None:
        until(lambda: self.service.model is not None)

    def signal(self, number=signal.SIGTERM) -> None:
        os.kill(os.getpid(), number)


def loads(script=None):
    released = []
    model = chat_model(script)
    return lambda: (model, lambda: released.append(True)), released


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_releases_the_model(number, status, capsys):
    load, released = loads()

    def beside(started):
        started.wait()
        assert httpx.get(f"{started.url}/health", timeout=60).status_code == 200
        started.signal(number)

    started = Started(load)
    assert started.run(beside) == status and released == [True]
    assert capsys.readouterr().out == f"ready: {started.url}/v1\n"


def test_a_running_answer_ends_and_new_ones_are_refused():
    gate = threading.Event()
    load, _ = loads(lambda prompt: ["first", gate, "last"])
    texts = []

    def beside(started):
        started.wait()
        body = {"messages": HI, "stream": True}
        with httpx.stream("POST", f"{started.url}/v1/chat/completions", json=body, timeout=60) as response:
            started.signal()
            until(lambda: httpx.get(f"{started.url}/health", timeout=60).status_code == 503)
            refused = httpx.post(f"{started.url}/v1/chat/completions", json=body, timeout=60)
            assert refused.json()["error"]["code"] == "shutting_down"
            gate.set()
            texts.append(response.read().decode())

    assert Started(load).run(beside) == 0
    assert "last" in texts[0] and texts[0].endswith("data: [DONE]\n\n")


def test_an_answer_that_takes_too_long_ends_with_an_error(capfd):
    load, released = loads(lambda prompt: ["first", threading.Event()])
    found = []

    def beside(started):
        started.wait()
        body = {"messages": HI, "stream": True}
        whole = threading.Thread(
            target=lambda: found.append(
                httpx.post(f"{started.url}/v1/chat/completions", json={"messages": HI}, timeout=60)
            )
        )
        whole.start()
        with httpx.stream("POST", f"{started.url}/v1/chat/completions", json=body, timeout=60) as response:
            until(lambda: started.service.admission.num_answers == 2)
            started.signal()
            found.append(response.read().decode())
        whole.join()

    assert Started(load, drain_seconds=0.2).run(beside) == 0 and released == [True]
    streamed = next(one for one in found if isinstance(one, str))
    (whole,) = (one for one in found if not isinstance(one, str))
    assert "shutting_down" in streamed and "[DONE]" not in streamed
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("fault", "raised"), [(ModelError("no"), ModelError), (KeyError("x"), RunFailed)])
def test_a_model_that_cannot_be_loaded_ends_it(fault, raised):
    def load():
        raise fault

    with pytest.raises(raised):
        Started(load).run(lambda started: None)


def test_a_model_that_answers_nothing_any_more_ends_it():
    failure = DeviceFailed("cuda:0 has failed")
    gate, found, released = threading.Event(), [], []
    model = chat_model(lambda prompt: ["first", gate, failure])

    def beside(started):
        started.wait()
        body = {"messages": HI, "stream": True}
        with httpx.stream("POST", f"{started.url}/v1/chat/completions", json=body, timeout=60) as response:
            model.engine.fault = str(failure)
            found.append(httpx.get(f"{started.url}/health", timeout=60))
            gate.set()
            found.append(response.read().decode())

    with pytest.raises(RunFailed, match="cuda:0 has failed"):
        Started(lambda: (model, lambda: released.append(True))).run(beside)
    assert released == [True]
    health, streamed = found
    assert (health.status_code, health.json()["error"]["message"]) == (503, "cuda:0 has failed")
    assert '"engine_ended"' in streamed and "[DONE]" not in streamed


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_is_loaded_when_the_server_has_ended(monkeypatch, capsys):
    begun, gate, run = threading.Event(), threading.Event(), asyncio.run

    def load():
        begun.set()
        gate.wait()
        return chat_model(None), lambda: None

    def run_and_load(main):
        run(main)
        gate.set()
        started.running._loading.join()

    def beside(started):
        begun.wait()
        started.signal()

    monkeypatch.setattr(asyncio, "run", run_and_load)
    started = Started(load)
    assert started.run(beside) == 0
    assert capsys.readouterr().out == ""


def test_an_address_that_cannot_be_used():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"API_PORT={port}"):
            listening_socket(ServerOptions(host="127.0.0.1", port=port))
    with pytest.raises(OutputError, match="API_HOST"):
        listening_socket(ServerOptions(host="192.0.2.1", port=0))
