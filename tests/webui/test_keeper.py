"""The keeper notes down the process and its end, and nothing but the run itself ends it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from luthier.webui import identity
from luthier.webui.keeper import BUSY, NOT_STARTED
from tests.waiting import until

SLEEPS = (sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(600)")


def keep(folder: Path, *command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "luthier.webui.keeper", str(folder), *command])


def wait_for(path: Path) -> dict[str, object]:
    until(path.exists, f"{path} does not come")
    return json.loads(path.read_text("utf-8"))


def test_a_run_from_its_start_to_its_end(tmp_path):
    (tmp_path / "exit.json").write_text('{"status": 1}', "utf-8")  # of an earlier start
    keeper = keep(tmp_path, *SLEEPS)
    record = wait_for(tmp_path / "board.json")
    pid, mark = record["pid"], record["mark"]
    assert record["argv"] == list(SLEEPS) and identity.is_same(pid, mark)
    assert not (tmp_path / "exit.json").exists()
    until(lambda: "begun" in (tmp_path / "console.log").read_text("utf-8"), "it does not begin")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        keeper.send_signal(number)
    second = keep(tmp_path, *SLEEPS)
    assert second.wait(120) == BUSY, "one folder is for one run"
    assert identity.is_same(pid, mark) and keeper.poll() is None
    assert os.getsid(pid) != os.getsid(0) and os.getsid(pid) != os.getsid(keeper.pid)
    identity.send(pid, mark, signal.SIGINT)
    assert keeper.wait(120) == 0
    assert wait_for(tmp_path / "exit.json")["status"] in (130, -signal.SIGINT)
    console = (tmp_path / "console.log").read_text("utf-8")
    assert console.startswith("$ luthier") and "begun" in console and "KeyboardInterrupt" in console


def test_a_program_that_cannot_be_started(tmp_path):
    assert keep(tmp_path, "/nowhere/at/all").wait(120) == 0
    assert wait_for(tmp_path / "exit.json")["status"] == NOT_STARTED
    assert "/nowhere/at/all: cannot be started (No such file or directory)" in (tmp_path / "console.log").read_text()
