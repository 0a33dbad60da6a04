"""Ctrl-C and SIGTERM while a command prepares its work."""

import signal
import subprocess
import sys

import psutil
import pytest

from luthier.core.signals import STOPPING, Serving, ending_on_signals

WAITS = """
import sys, time
from luthier.core.signals import ending_on_signals
try:
    with ending_on_signals():
        print("ready", flush=True)
        while True:
            time.sleep(0.01)  # a signal just before a sleep waits for its end
except KeyboardInterrupt:
    print("cleans up", flush=True)
    time.sleep(float(sys.argv[1]))
    print("ended", flush=True)
    sys.exit(130)
"""


def started(cleaning_seconds: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", WAITS, str(cleaning_seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_lets_the_command_clean_up(number):
    process = started(0)
    process.send_signal(number)
    assert process.communicate(timeout=120) == ("cleans up\nended\n", None)
    assert process.returncode == 130


@pytest.mark.parametrize("first", STOPPING)
@pytest.mark.parametrize("second", STOPPING)
def test_the_second_one_ends_it_at_once(first, second):
    process = started(600)
    process.send_signal(first)
    assert process.stdout is not None and process.stdout.readline() == "cleans up\n"
    process.send_signal(second)
    assert process.wait(120) == -second


def test_afterwards_signals_do_what_they_did():
    before = [signal.getsignal(number) for number in STOPPING]
    with ending_on_signals():
        assert [signal.getsignal(number) for number in STOPPING] != before
    with pytest.raises(ZeroDivisionError), ending_on_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_program_in_the_background_goes_on_ignoring_ctrl_c(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending_on_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_ignores_what_stops_its_process():
    previous, begun = {number: signal.getsignal(number) for number in STOPPING}, []
    try:
        Serving(begun.append)(3)
        assert begun == [3] and {signal.getsignal(number) for number in STOPPING} == {signal.SIG_IGN}
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


LEAVES_WORKERS = """
import multiprocessing, signal, time
from luthier.core.signals import Serving
def serve(serving, is_up):
    serving(0)
    is_up.set()
    time.sleep(600)
context, serving = multiprocessing.get_context("fork"), Serving()
is_up = context.Event()
worker = context.Process(target=serve, args=(serving, is_up), daemon=True)
worker.start()
is_up.wait()
print(worker.pid, flush=True)
"""


def test_a_process_ends_although_its_workers_ignore_that():
    done = subprocess.run([sys.executable, "-c", LEAVES_WORKERS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert not psutil.pid_exists(int(done.stdout))
