"""A child of luthier ends with its parent, and gets the signals that its parent blocks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.workflow.launch.child import command_of
from tests.waiting import until

PARENT = """
import signal, subprocess, sys, time
from luthier.workflow.launch.child import command_of
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
child = subprocess.Popen(command_of(["check", sys.argv[1]]))
print(child.pid, flush=True)
child.wait()
"""


def test_it_runs_the_command():
    done = subprocess.run(command_of(["version"]), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("luthier ")
    assert subprocess.run(command_of(["trian"]), capture_output=True, check=False).returncode == 2


def test_it_does_nothing_if_its_parent_has_ended_before_it_began():
    words = command_of(["version"])
    words[words.index(str(os.getpid()))] = "1"
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
@pytest.mark.parametrize("how", ["the parent is killed", "a signal"])
def test_it_ends(tmp_path, how):
    """The child waits for a run file that nobody writes."""
    os.mkfifo(tmp_path / "run.yaml")
    words = [sys.executable, "-c", PARENT, str(tmp_path / "run.yaml")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until(lambda: is_open_to(child, signal.SIGTERM))
    if how == "a signal":
        os.kill(child, signal.SIGTERM)
    else:
        parent.kill()
    until(lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes())
    parent.kill()
    parent.wait()


def is_open_to(number: int, wanted: int) -> bool:
    """Whether a process has ended to block a signal."""
    blocked = re.search(r"^SigBlk:\s*([0-9a-f]+)", Path(f"/proc/{number}/status").read_text(), re.M)
    return blocked is not None and not int(blocked[1], 16) >> (wanted - 1) & 1
