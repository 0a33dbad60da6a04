"""Functions and servers that score answers: their arguments, and which scores are valid."""

import math
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread, local
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import InvalidInput, RunFailed
from luthier.training.rewards import Answered, WeightedRewards, checked, titles
from luthier.training.rewards.functions import FunctionReward, load_function
from luthier.training.rewards.server import RewardServer
from tests.deep import deep_list


def answered(answer: str) -> Answered:
    return Answered([1], [2, 3], "prompt", answer, "given", f"prompt{answer}", stopped=True)


ANSWERS = [answered("a"), answered("bcd")]


def test_a_function_gets_what_it_has_parameters_for():
    seen: dict[str, Any] = {}

    def lengths(completions, answers):
        seen.update(completions=completions, answers=answers)
        return [len(text) for text in completions]

    assert FunctionReward("lengths", lengths)(ANSWERS) == [1.0, 3.0]
    assert seen == {"completions": ["a", "bcd"], "answers": ["given", "given"]}
    assert FunctionReward("all", lambda **texts: [float(len(texts))] * 2)(ANSWERS) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0], "returned 1 scores for 2 answers"),
        ("ab", "returned a str"),
        (None, "returned a NoneType"),
        ([1.0, math.nan], "the score of answer 1 is nan"),
        ([math.inf, 1.0], "the score of answer 0 is inf"),
        ([10**400, 1.0], "the score of answer 0 is 1000"),
        ([1.0, [2.0]], r"the score of answer 1 is \[2"),
        ({"a": 1.0, "b": 2.0}, "returned a dict"),
        ([1.0, "good"], "the score of answer 1 is 'good'"),
    ],
)
def test_scores_that_are_none_are_one_error_with_the_name(scores, words):
    with pytest.raises(RunFailed, match=words) as caught:
        checked("reward_funcs: mine", scores, ANSWERS)
    assert str(caught.value).startswith("reward_funcs: mine: ")


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([0.5, 2.0]),
        [torch.tensor(0.5), torch.tensor([2])],
        [np.float32(0.5), np.int64(2)],
        (np.float32(0.5), np.float32(2)),
        np.array([0.5, 2], dtype=np.float32),
        [0.5, np.float64(2)],
    ],
)
def test_tensors_and_numbers_of_numpy_are_as_good_as_a_list(scores):
    found = checked("x", scores, ANSWERS)
    assert found == [0.5, 2.0] and all(type(score) is float for score in found)


def test_an_exception_of_a_function_is_reported_with_the_call_that_reproduces_it():
    def breaks(completions):
        raise KeyError("missing")

    with pytest.raises(RunFailed, match=r"breaks: it raised KeyError: 'missing' -> call it with completions=\['a'\]"):
        FunctionReward("breaks", breaks)(ANSWERS)


def test_the_weighted_sum_and_the_score_of_each_reward():
    one, two = (FunctionReward(name, lambda completions, n=n: [n] * 2) for name, n in (("one", 1), ("two", 10)))
    sums, each = WeightedRewards([one, two], [2.0, 0.5])(ANSWERS)
    assert sums == [7.0, 7.0] and each == {"one": [1.0, 1.0], "two": [10.0, 10.0]}
    assert WeightedRewards([one], [1.0])(ANSWERS) == ([1.0, 1.0], {})


HANGS = """
import threading, time
from luthier.training.callbacks.interrupt import StopOnSignal
from luthier.training.rewards.functions import FunctionReward

def hangs():
    print("hangs", flush=True)
    threading.Event().wait()

with StopOnSignal():
    FunctionReward("hangs", hangs)([])
"""


def test_a_second_signal_does_not_wait_for_a_function_that_hangs():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None and any("press Ctrl-C again" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    assert process.returncode != 0


def test_a_file_with_a_dataclass_and_two_files_of_one_name(tmp_path):
    text = """
from __future__ import annotations
import sys
from dataclasses import dataclass, field

@dataclass
class Scale:
    by: list[float] = field(default_factory=lambda: [NUMBER])

def scaled(completions):
    assert vars(sys.modules[Scale.__module__])["scaled"] is scaled
    return Scale().by * len(completions)
"""
    loaded = []
    for number in (1, 2):
        file = tmp_path / str(number) / "mine.py"
        file.parent.mkdir()
        file.write_text(text.replace("NUMBER", str(number)))
        loaded.append(load_function(f"{file}:scaled"))
    assert [function(ANSWERS) for function in loaded] == [[1.0, 1.0], [2.0, 2.0]]


def test_a_function_runs_on_the_accelerator_of_its_process(monkeypatch):
    devices = local()
    devices.index = 3  # of this thread; others have 0
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: getattr(devices, "index", 0))
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: setattr(devices, "index", index))
    on_device = FunctionReward("on", lambda completions: [torch.accelerator.current_device_index()] * len(completions))
    assert on_device(ANSWERS) == [3.0, 3.0]


class CutOff(BaseHTTPRequestHandler):
    """Announces more than it sends, as a server that dies."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b'{"scores"')

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_that_dies_while_it_answers():
    server = HTTPServer(("127.0.0.1", 0), CutOff)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(RunFailed, match=r"no scores \(IncompleteRead\(9 bytes read, 91 more expected\)\)"):
        RewardServer(f"http://127.0.0.1:{server.server_port}/", pause_seconds=0.0)([])
    server.shutdown()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_server_that_redirects_is_asked_once(status):
    """urllib would ask the other address for nothing: with GET, and without the answers."""
    asked = []

    class Moved(CutOff):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Location", "/v1/score")
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Moved)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(RunFailed, match="it redirects to /v1/score, which is the address to name"):
        RewardServer(f"http://127.0.0.1:{server.server_port}/", pause_seconds=0.0)(ANSWERS)
    server.shutdown()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (deep_list(100_000).encode(), "maximum recursion depth exceeded"),
        (b"<html>hi</html>", r"no scores \(the response is not JSON, it begins with '<html>hi</html>'\)"),
    ],
    ids=["lists without end", "a page"],
)
def test_a_server_that_answers_with_something_else(body, words):
    class Other(CutOff):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Other)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(RunFailed, match=words):
        RewardServer(f"http://127.0.0.1:{server.server_port}/", pause_seconds=0.0)([])
    server.shutdown()


def test_the_log_tells_rewards_apart():
    assert titles(["a/f.py:one", "b/f.py:one", "b/f.py:two", "json:x"]) == {
        "a/f.py:one": "a/f.py:one",
        "b/f.py:one": "b/f.py:one",
        "b/f.py:two": "f.py:two",
        "json:x": "json:x",
    }


def test_functions_are_found_in_files_and_modules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(completions):\n    return [-len(text) for text in completions]\n")
    assert load_function(f"{file}:short")(ANSWERS) == [-1.0, -3.0]
    assert load_function("tests.small_world:small_letters")(ANSWERS) == [1.0, 1.0]
    for name, words in ((f"{file}:long", "no function long"), ("no.such.module:f", "cannot be imported")):
        with pytest.raises(InvalidInput, match=words):
            load_function(name)
    file.write_text("1 / 0\n")
    with pytest.raises(InvalidInput, match="ZeroDivisionError"):
        load_function(f"{file}:short")


def test_a_parameter_that_nothing_is_given_for_is_found_before_answers_are_sampled(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def takes_all(prompts, completions, answers, images, videos, audios, *more, scale=1.0, **others): ...\n"
        "def has_more(prompts, completions, completion_ids, **others): ...\n"
        "def by_place(completions, /): ...\n"
    )
    load_function(f"{file}:takes_all")
    with pytest.raises(InvalidInput, match=r"parameter completion_ids -> .* prompts, completions, answers, images"):
        load_function(f"{file}:has_more")
    with pytest.raises(InvalidInput, match=r"parameter completions -> .* by name"):
        load_function(f"{file}:by_place")


@pytest.mark.parametrize(
    ("statuses", "num_requests", "message"),
    [
        ([429, 503], 3, None),
        ([429, 429, 429], 3, "no scores (status 429: busy)"),
        ([422], 1, "no scores (status 422: busy)"),
    ],
)
def test_a_busy_server_is_asked_again(statuses, num_requests, message):
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            is_busy = len(asked) <= len(statuses)
            data = b"busy" if is_busy else b'{"scores": [1, 2.5]}'
            self.send_response(statuses[len(asked) - 1] if is_busy else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            """Tests print nothing."""

    server = HTTPServer(("127.0.0.1", 0), Busy)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    reward = RewardServer(f"http://127.0.0.1:{server.server_port}/", pause_seconds=0.0)
    try:
        if message is None:
            assert reward(ANSWERS) == [1.0, 2.5]
        else:
            with pytest.raises(RunFailed) as caught:
                reward(ANSWERS)
            assert message in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()
    assert len(asked) == num_requests


def test_a_server_that_is_too_slow():
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections wait, and nobody answers
        reward = RewardServer(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_seconds=0.02, pause_seconds=0.0)
        with pytest.raises(RunFailed, match=r"no scores \(timed out\)"):
            reward(ANSWERS)
