"""The keeper passes the status of its program on, and ends the program with its own input, or by a signal."""

import signal
import subprocess
import sys

from luthier.infer.servers import keeper
from tests.infer.servers.programs import is_running
from tests.waiting import until

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(999)"
)


def kept(code: str, before: str = "") -> subprocess.Popen:
    words = [sys.executable, "-c", code]
    if before:
        words = [sys.executable, "-c", f"{before}; import subprocess; subprocess.run({words!r})"]
    return subprocess.Popen(
        [sys.executable, "-I", keeper.__file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_the_status_of_the_program_is_its_own():
    assert kept("raise SystemExit(5)").wait(300) == 5


def test_the_end_of_the_input_ends_the_program_and_its_children():
    # The child of the program prints its pid, ignores SIGTERM, and is killed as the last of the group.
    process = kept(f"import os; print(os.getpid(), flush=True); {STUBBORN}", before="import os")
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "up\n" and is_running(pid)
    process.stdin.close()
    assert process.wait(300) != 0
    until(lambda: not is_running(pid))


def test_a_signal_to_the_keeper_ends_the_program():
    process = kept("import os, time; print(os.getpid(), flush=True); time.sleep(999)")
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    until(lambda: not is_running(pid))


SIGNALED_AT_ONCE = """
import os, signal, subprocess, sys
from luthier.infer.servers import keeper
class Popen(subprocess.Popen):
    def __init__(self, *words, **how):
        super().__init__(*words, **how)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
keeper.subprocess.Popen = Popen
sys.exit(keeper.main([sys.executable, "-c", "import time; time.sleep(999)"]))
"""


def test_a_signal_while_the_program_is_started_ends_it():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SIGNALED_AT_ONCE], stdin=pipe, stdout=pipe, text=True) as process:
        pid = int(process.stdout.readline())
        assert process.wait(300) == 128 + signal.SIGTERM
    until(lambda: not is_running(pid))


def test_a_program_that_does_not_listen_is_killed(monkeypatch):
    monkeypatch.setattr(keeper, "GRACE_SECONDS", 0.1)
    program = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert program.stdout.readline() == "up\n"
    keeper.end(program)
    assert program.returncode == -signal.SIGKILL
