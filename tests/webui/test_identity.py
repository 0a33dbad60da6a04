"""A process is told from another one with the same number."""

import os
import signal
import subprocess
import sys

from luthier.webui.identity import is_same, mark_of, send


def test_this_process_is_itself_and_no_other_one():
    mark = mark_of(os.getpid())
    assert mark is not None and is_same(os.getpid(), mark)
    assert not is_same(1, mark)
    assert not is_same(0, mark) and mark_of(2**30) is None


def test_a_signal_reaches_the_process_with_the_mark_alone():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    mark = mark_of(process.pid)
    assert mark is not None
    try:
        assert not send(process.pid, "another start", signal.SIGKILL)
        assert process.poll() is None
        assert send(process.pid, mark, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has collected it
        assert mark_of(process.pid) is None
        assert process.wait() == -signal.SIGKILL
        assert not send(process.pid, mark, signal.SIGKILL)
    finally:
        process.kill()
