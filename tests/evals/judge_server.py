"""A small OpenAI-style server that judges by a rule, for tests."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

_ANSWERS = re.compile(r"<first_answer>\n(.*)\n</first_answer>\n\n<second_answer>\n(.*)\n</second_answer>", re.DOTALL)

Reply = tuple[int, Any, dict[str, str]]
"""Status, content (an object or bytes), further headers."""


@dataclass
class JudgeServer:
    url: str
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    """Path, headers in lower case, and body of each request."""


def says(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def always_first(first: str, second: str) -> str:
    return "It is better.\n\nfirst"


def the_longer(first: str, second: str) -> str:
    return "first" if len(first) > len(second) else "second" if len(second) > len(first) else "tie"


def by_rule(rule: Callable[[str, str], str]) -> Callable[[int, Any], Reply]:
    """The judge that sees two answers and gives the text of a verdict."""

    def answer(count: int, body: Any) -> Reply:
        found = _ANSWERS.search(body["messages"][-1]["content"])
        assert found is not None, "the judge is shown two answers"
        return says(rule(found[1], found[2]))

    return answer


@contextmanager
def judge_server(answer: Callable[[int, Any], Reply]) -> Iterator[JudgeServer]:
    """`answer(number of the request from 0, its body)` decides what is sent back."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count = len(judge.requests)
                headers = {name.lower(): value for name, value in self.headers.items()}
                judge.requests.append((self.path, headers, body))
            status, content, further = answer(count, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **further}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that did not wait
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1")
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
