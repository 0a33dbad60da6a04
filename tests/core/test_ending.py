"""A process that ends without taking apart what it has imported loses no output and skips no function of `atexit`."""

import json
import os
import subprocess
import sys

import pytest

from luthier.cli import ends_quickly
from tests.small_world import small_world

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


def test_open_files_are_written(tmp_path):
    files = [("a.txt", "w", "'é'"), ("b.bin", "wb", "b'b'"), ("c.bin", "w+b", "b'c'")]
    opened = [f"open({str(tmp_path / name)!r}, {mode!r})" for name, mode, _ in files]
    wrote = [
        f"kept.{name[0]} = {call}; kept.{name[0]}.write({text})"
        for (name, _, text), call in zip(files, opened, strict=True)
    ]
    closed = "kept.d = open(1, 'w', closefd=False); kept.d.close(); kept.e = open('/dev/full', 'w'); kept.e.write('e')"
    done = run(last="\n".join([*wrote, closed, "end.status = 0"]))
    assert done.returncode == 0 and done.stderr == ""
    assert [(tmp_path / name).read_bytes() for name, *_ in files] == ["é".encode(), b"b", b"c"]


HOLDS_INTERPRETER = """
import atexit, sys, time
def hold_the_interpreter():
    sys.setswitchinterval(1000)
    began = time.monotonic()
    while time.monotonic() - began < 1:
        pass
atexit.register(hold_the_interpreter)
"""
OF_TWO = """
from luthier.core.ending import QuickEnd
{end}
import os, time
from torch import distributed, ones
distributed.init_process_group("gloo")
distributed.barrier()
if distributed.get_rank() == 0:
    time.sleep(0.2)
    try:
        distributed.all_reduce(ones(4))
        time.sleep(0.5)
    finally:
        os._exit(0)
{holds}
def late():
    distributed.all_reduce(ones(4), async_op=True)
late()
"""
"""A thread of process 1 gives back a tensor while the interpreter ends, as it does when the machine is busy."""


@pytest.mark.thorough
@pytest.mark.parametrize("is_quick", [True, False])
def test_threads_of_torch_do_not_abort_one_of_several_processes(tmp_path, is_quick):
    program = tmp_path / "two.py"
    program.write_text(OF_TWO.format(holds=HOLDS_INTERPRETER, end="QuickEnd().status = 0" if is_quick else ""))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if is_quick:
        assert done.returncode == 0, done.stderr
    elif done.returncode == 0:
        pytest.skip("this torch or Python ends such threads without harm; `QuickEnd` is not needed for them")


TRAINS = f"""
import json, os, sys, time
import luthier
{HOLDS_INTERPRETER}
keys = json.loads(sys.argv[1])
luthier.train(keys)
luthier.train({{**keys, "seed": 2}})
from torch import distributed, ones
if distributed.get_rank() == 0:
    time.sleep(0.2)
work = distributed.all_reduce(ones(4), async_op=True)
del work
if distributed.get_rank() == 0:
    time.sleep(0.5)
    os._exit(0)
"""
"""As `OF_TWO`, after two runs of luthier."""


@pytest.mark.thorough
@pytest.mark.parametrize("leaves", [True, False])
def test_a_program_that_trains_is_not_aborted_either(tmp_path, leaves):
    program = tmp_path / "trains.py"
    program.write_text(TRAINS if leaves else "from luthier.core import ending\nending._leave_group = print\n" + TRAINS)
    keys = json.dumps({**small_world(tmp_path), "max_steps": 2})
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program), keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if leaves:
        assert done.returncode == 0, done.stderr
    elif done.returncode == 0:
        pytest.skip("this torch or Python ends such threads without harm; `leave_group_at_end` is not needed for them")


@pytest.mark.parametrize(
    ("command", "num_processes", "is_quick"),
    [("plan", None, True), ("train", None, False), ("train", "1", False), ("train", "2", True), ("sft", "2", True)],
)
def test_the_commands_that_end_so(monkeypatch, command, num_processes, is_quick):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if num_processes is not None:
        monkeypatch.setenv("WORLD_SIZE", num_processes)
    assert ends_quickly(command) == is_quick


INTERRUPTED = """
import os, signal, sys
from luthier import cli
from luthier.core.threads import in_own_thread
def load(argv):
    import torch
    matrix = torch.ones(200, 200)
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        matrix @ matrix
cli._run = lambda name, argv: in_own_thread(lambda: load(argv))
sys.argv = ["luthier", "eval", "run.yaml"]
sys.exit(cli.main())
"""


def test_an_interrupted_command_does_not_wait_for_a_thread_that_computes_and_is_not_aborted_by_it():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "luthier: interrupted\n")


def test_an_exception_ends_the_process_as_ever():
    done = run(last="raise OSError('full')")
    assert done.returncode == 1 and "OSError: full" in done.stderr and "destroyed" in done.stderr


def test_output_that_cannot_be_written_is_reported():
    done = run(last="end.status = 0\nimport os\nos.close(1)")
    assert done.returncode == 120 and "destroyed" in done.stderr
