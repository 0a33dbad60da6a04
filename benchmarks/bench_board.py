"""How fast the pages of the board are, and what open pages cost a run.

    python -m benchmarks.bench_board [--only pages|clients] [--rounds 5]

Pages: milliseconds in headless Chromium from the request until what counts is drawn, with 500 runs below the root and
a log of 100,000 steps. Each page is opened once more than it is counted, except for the first view.

Clients: CPU seconds of a training process for each of its steps, with no page and with 20 pages of this run open, in
turn. The pages are sockets without a browser, whose drawing would disturb the run on so small a machine.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import socketio
import yaml

from benchmarks.bench_startup import DATASET_INFO, ROWS, make_model
from luthier.webui import process
from luthier.webui.runs import Run, read_run
from tests.webui.browser import BoardProcess, Browser, board, browser

NUM_RUNS, NUM_STEPS, NUM_PAGES = 500, 100_000, 20
WINDOW_SECONDS = 15.0
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
RUN = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "identity",
    "template": "auto",
    "max_steps": 100_000,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
}
PAGES = {
    "/": (f"document.querySelectorAll('.runs tbody tr').length == {NUM_RUNS + 1}", 1000),
    "/run/saves/run-1": ("document.querySelectorAll('.chart svg path').length > 5", 500),
    "/run/long": ("document.querySelectorAll('.chart svg path').length > 20", 1000),
    "/compare?run=saves/run-1&run=long": ("document.querySelectorAll('.chart svg path').length > 4", 500),
    "/new": ("document.querySelector('#learning_rate')", 500),
    "/export": ("document.querySelector('#export_dir')", 500),
    "/data": ("document.querySelector('#dataset_dir')", 500),
    "/chat": ("document.querySelector('#message, .empty')", 500),
}
"""Address -> (what is true when it is drawn, the goal in milliseconds)."""


def logged(num_steps: int) -> str:
    """Lines of trainer_log.jsonl."""
    return "".join(
        json.dumps(
            {
                "current_steps": step,
                "total_steps": num_steps,
                "loss": 1 + 1 / step + step % 7 / 10,
                "lr": 1e-4 * step,
                "grad_norm": step % 11,
                "epoch": step / num_steps,
                "percentage": 100 * step / num_steps,
                "elapsed_time": "0:01:00",
                "remaining_time": "0:00:00",
                "throughput": 100.5,
            }
        )
        + "\n"
        for step in range(1, num_steps + 1)
    )


def many_runs(root: Path) -> None:
    few, many = logged(200), logged(NUM_STEPS)
    for number in range(NUM_RUNS + 1):
        folder = root / "saves" / f"run-{number}" if number < NUM_RUNS else root / "long"
        folder.mkdir(parents=True)
        record = {"argv": [], "pid": 1, "mark": "", "host": platform.node(), "started": 1e9 + number}
        (folder / "board.json").write_text(json.dumps(record), encoding="utf-8")
        (folder / "board.yaml").write_text("stage: sft\n", encoding="utf-8")
        (folder / "exit.json").write_text('{"status": 0}', encoding="utf-8")
        (folder / "trainer_log.jsonl").write_text(few if number < NUM_RUNS else many, encoding="utf-8")


def milliseconds(page: Browser, address: str, is_drawn: str) -> float:
    """From the request to the frame in which the page is drawn, by the clock of the page."""
    page.driver.get(address)
    page.until(lambda: page.js(f"return Boolean({is_drawn})"), address)
    return float(page.js("return performance.now()"))


def measure_pages(root: Path, rounds: int) -> None:
    many_runs(root)
    print(f"milliseconds until a page is drawn, {rounds} rounds\n{'page':<36}{'median':>8}{'worst':>8}{'goal':>8}")
    with board(root) as served, browser(root.parent) as page:
        first = milliseconds(page, served.address, PAGES["/"][0])
        print(f"{'the first view, with 500 runs':<36}{first:>8.0f}{first:>8.0f}{1500:>8}", flush=True)
        first = milliseconds(page, f"{served.home}/run/long", PAGES["/run/long"][0])
        print(f"{'/run/long, for the first time':<36}{first:>8.0f}{first:>8.0f}{1000:>8}", flush=True)
        for path, (is_drawn, goal) in PAGES.items():
            times = [milliseconds(page, served.home + path, is_drawn) for _ in range(rounds + 1)][1:]
            print(f"{path:<36}{statistics.median(times):>8.0f}{max(times):>8.0f}{goal:>8}", flush=True)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process since its start, from proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def open_pages(served: BoardProcess, path: str, count: int) -> Iterator[None]:
    """Pages that get all that a browser would get."""
    sockets, received = [], list[int]()
    with httpx.Client(base_url=served.home) as client:
        client.get("/", params={"token": served.address.partition("token=")[2]}, follow_redirects=True)
        cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
        for number in range(count):
            found = re.search(r"'client_id': '([^']+)'", client.get(path).text)
            assert found, "the page has no socket"
            query = {"client_id": found[1], "tab_id": f"tab-{number}", "document_id": f"document-{number}"}
            query |= {"next_message_id": "0", "implicit_handshake": "true"}
            words = "&".join(f"{name}={value}" for name, value in query.items())
            socket = socketio.Client(reconnection=False)
            socket.on("update", lambda message: received.append(len(message)))
            socket.connect(
                f"{served.home}?{words}",
                headers={"Cookie": cookies},
                socketio_path="/_nicegui_ws/socket.io",
                transports=["websocket"],
            )
            sockets.append(socket)
    try:
        yield
        assert len(received) > count or not count, "the pages are not live"
    finally:
        for socket in sockets:
            socket.disconnect()


def watched(run: Run, served: BoardProcess) -> tuple[float, float, float]:
    """CPU seconds of the run for a step, its steps in a second, and CPU seconds of the board in a second."""

    def now() -> tuple[float, float, float, float]:
        step = read_run(run.folder).last["current_steps"]
        return time.monotonic(), cpu_seconds(run.pid), cpu_seconds(served.process.pid), step

    before = now()
    time.sleep(WINDOW_SECONDS)
    passed, spent, board_spent, steps = (after - was for was, after in zip(before, now(), strict=True))
    return spent / steps, steps / passed, board_spent / passed


def measure_clients(root: Path, rounds: int) -> None:
    (root / "data").mkdir(parents=True)
    (root / "data" / "dataset_info.json").write_text(DATASET_INFO, encoding="utf-8")
    (root / "data" / "identity.json").write_text(json.dumps(json.loads(ROWS) * 64), encoding="utf-8")
    make_model(root / "model", **SIZES)
    folder = root / "saves" / "live"
    places = {"model_name_or_path": root / "model", "dataset_dir": root / "data", "output_dir": folder}
    run = process.start(folder, yaml.safe_dump(RUN | {key: str(path) for key, path in places.items()}))
    found: dict[int, list[tuple[float, float, float]]] = {0: [], NUM_PAGES: []}
    try:
        while not read_run(folder).last.get("current_steps", 0) > 20:
            assert read_run(folder).is_live, (folder / "console.log").read_text("utf-8")
            time.sleep(0.2)
        for _ in range(rounds):
            for count, rows in found.items():
                with board(root) as served, open_pages(served, "/run/saves/live", count):
                    rows.append(watched(run, served))
    finally:
        process.kill(read_run(folder))
    print(f"{'open pages':<12}{'CPU ms / step of the run':>26}{'steps / s':>12}{'CPU of the board':>18}")
    for count, rows in found.items():
        spent, speed, board_spent = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{count:<12}{1000 * spent:>26.1f}{speed:>12.2f}{board_spent:>17.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("pages", "clients"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name, measure in (("pages", measure_pages), ("clients", measure_clients)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "root").mkdir()
                measure(Path(folder) / "root", options.rounds)


if __name__ == "__main__":
    main()
