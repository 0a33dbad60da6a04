"""A process that ends without taking apart what it has imported loses no output and skips no function of `atexit`."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, ctypes, sys
{first}
from luthier.core.ending import QuickEnd
end = QuickEnd()
class Kept:
    def __del__(self):
        print("destroyed", file=sys.stderr)
kept = Kept()
atexit.register(print, "registered later")
print("written", end=" ")
ctypes.CDLL(None).printf(b"by C\\n")
{last}
"""


def run(first="", last="end.status = 3\nsys.exit(3)"):
    program = PROGRAM.format(first=first, last=last)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False)


def test_all_is_written_and_nothing_is_destroyed():
    done = run()
    assert done.returncode == 3 and done.stderr == ""
    assert set(done.stdout.splitlines()) == {"written registered later", "by C"}


@pytest.mark.parametrize(
    ("first", "last"),
    [("atexit.register(print, 'registered before')", "end.status = 3"), ("", "")],
    ids=["another function of atexit runs after it", "no status"],
)
def test_otherwise_the_process_ends_as_ever(first, last):
    done = run(first, last)
    assert done.returncode == 0 and done.stderr == "destroyed\n"
    assert "registered later" in done.stdout and ("registered before" in done.stdout) == bool(first)


def test_an_exception_ends_the_process_as_ever():
    done = run(last="raise OSError('full')")
    assert done.returncode == 1 and "OSError: full" in done.stderr and "destroyed" in done.stderr


def test_output_that_cannot_be_written_is_reported():
    done = run(last="end.status = 0\nimport os\nos.close(1)")
    assert done.returncode == 120 and "destroyed" in done.stderr
