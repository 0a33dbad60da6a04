"""What HTTP adds to the time of one caller, and what idle streams cost in memory.

    python benchmarks/bench_api.py [--model PATH] [--answer 64] [--rounds 5]

Greedy, float32, on the CPU. Server and client share a process, so the figures are upper bounds.
"""

import argparse
import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import uvicorn

from luthier.config.load import load_infer
from luthier.serve.app import build
from luthier.serve.loading import load_model
from luthier.serve.model import ChatModel
from luthier.serve.options import ServerOptions

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"
QUESTION = "Tell me about the history of the violin, from its beginnings to today."


@contextlib.contextmanager
def serving(model: ChatModel) -> Iterator[str]:
    """The address of a server in a thread."""
    app, service = build(ServerOptions(host="127.0.0.1"))
    service.model = model
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, release = load_model(load_infer({"model_name_or_path": options.model, "infer_dtype": "float32"}), None)
    assert isinstance(model, ChatModel)
    settings = replace(model.settings, do_sample=False, max_new_tokens=options.answer, ignore_eos=True)
    with serving(model) as url, httpx.Client(base_url=url, timeout=600) as client:
        fields = {"max_tokens": options.answer, "ignore_eos": True, "temperature": 0}
        body = {"messages": [{"role": "user", "content": QUESTION}], **fields}
        prompt = client.post("/tokenize", json={"messages": body["messages"]}).json()["tokens"]
        ways = {
            "engine": lambda: model.engine.generate(prompt, settings),
            "HTTP": lambda: client.post("/v1/chat/completions", json=body).raise_for_status(),
            "HTTP, streamed": lambda: client.post("/v1/chat/completions", json={**body, "stream": True}).text,
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for name, work in [*ways.items()] * (options.rounds + 1):  # in turn, since a machine's speed changes
            found[name].append(seconds(work))
    release()
    best = {name: statistics.median(times[1:]) for name, times in found.items()}
    for name, median in best.items():
        print(f"{name:<15} {median:7.3f} s for {options.answer} tokens, {median / best['engine'] - 1:+.1%}")


if __name__ == "__main__":
    main()
