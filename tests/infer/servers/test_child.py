"""A server is waited for, its death is told with its log, and no process of it is left, whatever ends luthier."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from luthier.core.errors import RunFailed
from luthier.core.ports import free_port
from luthier.infer.servers import child
from luthier.infer.servers.child import ChildServer, find_program
from tests.infer.servers.programs import ROOT, is_running, kill, processes_with
from tests.waiting import until

SERVES = """
import http.server, os, subprocess, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words): pass
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)", "worker-of", sys.argv[2]])
print("loading", flush=True)
while len(sys.argv) > 3 and not os.path.exists(sys.argv[3]):
    time.sleep(0.01)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def serving(mark: str, *begins_at: str) -> ChildServer:
    """`begins_at`: the file that it waits for before it serves."""
    port = free_port()
    return ChildServer("vllm", [sys.executable, "-c", SERVES, str(port), mark, *begins_at], port, {})


def test_a_server_answers_and_leaves_no_process_and_no_log(tmp_path, said):
    server = serving(str(tmp_path))
    server.wait_until_healthy()
    assert server.is_alive and server.log.read_text() == "loading\n"
    assert said == [f"starting vllm; its log is {server.log}"]
    # The keeper, the server and its worker.
    assert len(processes_with(str(tmp_path))) == 3
    server.close()
    until(lambda: not processes_with(str(tmp_path)))
    assert not server.log.exists()
    server.close()  # twice does no harm


def test_who_waits_is_told_what_for(tmp_path, said, monkeypatch):
    monkeypatch.setattr(child, "TELL_SECONDS", 0.3)
    server = serving(str(tmp_path), str(tmp_path / "loaded"))

    def load():
        until(lambda: any(re.fullmatch(r"waiting for vllm \(\d+ s\): loading", line) for line in said))
        (tmp_path / "loaded").touch()

    thread = threading.Thread(target=load)
    thread.start()
    server.wait_until_healthy()
    thread.join()
    server.close()


def test_a_server_that_dies_at_once_is_an_error_with_the_end_of_its_log():
    code = "print('ValueError: \\x1b[31mno GPU\\x1b[0m'); raise SystemExit(3)"
    server = ChildServer("vllm", [sys.executable, "-c", code], free_port(), {})
    with pytest.raises(RunFailed, match=r"vllm ended before it answered with status 3 -> its log says why: ") as caught:
        server.wait_until_healthy()
    assert str(caught.value).endswith(f"{server.log}, which ends: ValueError: no GPU")
    assert "no GPU" in server.log.read_text()
    server.log.unlink()


def test_a_server_does_not_hear_of_the_launcher_of_this_process(monkeypatch):
    """vLLM and SGLang make a process group of their own, and torch would look for its store at torchrun's agent."""
    theirs = {"TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    theirs |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (theirs | {"OF_THE_USER": "1"}).items():
        monkeypatch.setenv(name, value)
    code = "import os; print(*sorted(os.environ)); raise SystemExit(3)"
    server = ChildServer("vllm", [sys.executable, "-c", code], free_port(), {"VLLM_API_KEY": "k"})
    assert server.ends_within(300)
    names = server.log.read_text().split()
    assert not theirs.keys() & set(names) and {"OF_THE_USER", "VLLM_API_KEY", "PATH"} <= set(names)
    server.log.unlink()


def test_a_server_ends_although_a_forked_process_holds_its_pipe(tmp_path, monkeypatch):
    """Such as a worker of a data loader: the end of the pipe does not reach the keeper then."""
    monkeypatch.setattr(child, "_END_SECONDS", 3.0)
    server = serving(str(tmp_path))
    server.wait_until_healthy()
    pids = processes_with(str(tmp_path))
    holder = os.dup(server._process.stdin.fileno())
    try:
        server.close()
        until(lambda: not any(map(is_running, pids)))
    finally:
        os.close(holder)


def test_an_interrupt_while_it_loads_ends_the_server(tmp_path, monkeypatch):
    server = serving(str(tmp_path), str(tmp_path / "never"))
    until(lambda: len(processes_with(str(tmp_path))) == 3)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(child.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.wait_until_healthy()
    monkeypatch.undo()
    until(lambda: not processes_with(str(tmp_path)))


def test_the_death_of_an_idle_server_is_told_at_once(tmp_path, said):
    server = serving(str(tmp_path))
    server.wait_until_healthy()
    (pid,) = [pid for pid in processes_with(str(tmp_path)) if words_of(pid)[1:3] == ["-c", SERVES]]
    kill(pid)
    until(lambda: len(said) == 2)
    assert said[1].startswith("warning: vllm ended with status ") and str(server.log) in said[1]
    assert server.ends_within(60) and not server.is_alive
    server.close()
    server.log.unlink()


def test_a_server_that_nobody_refers_to_ends(tmp_path):
    server = serving(str(tmp_path))
    server.wait_until_healthy()
    del server
    gc.collect()
    until(lambda: not processes_with(str(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_luthier(tmp_path, number):
    code = f"""
import sys, time
from tests.infer.servers.test_child import serving
server = serving({str(tmp_path)!r})
server.wait_until_healthy()
print("up", flush=True)
time.sleep(999)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "up\n"
    pids = processes_with(str(tmp_path))
    process.send_signal(number)
    process.wait(300)
    until(lambda: not any(map(is_running, pids)))


def test_a_program_is_looked_for_beside_python_and_then_on_the_path(tmp_path, monkeypatch):
    assert find_program(Path(sys.executable).name) == sys.executable
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program("vllm-of-a-test") is None
    program = tmp_path / "vllm-of-a-test"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_program("vllm-of-a-test") == str(program)
