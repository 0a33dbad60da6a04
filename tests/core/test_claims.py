"""One process at a time in a folder."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from luthier.core.claims import claiming
from luthier.core.errors import OutputError

CLAIM = """
import sys
from pathlib import Path
from luthier.core.claims import claiming
with claiming("output_dir", Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def claim(folder) -> None:
    with claiming("output_dir", folder):
        pass


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that has claimed the folder."""
    words = [sys.executable, "-c", CLAIM, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, elsewhere):
    with pytest.raises(OutputError, match=r"another run is going on in this folder.* -> ") as refused:
        claim(tmp_path)
    assert str(refused.value).startswith(f"output_dir: {tmp_path}: ") and refused.value.exit_status == 2
    elsewhere.kill()
    elsewhere.wait()
    claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_thread_is_refused(tmp_path):
    with claiming("output_dir", tmp_path), ThreadPoolExecutor(1) as thread:
        assert isinstance(thread.submit(claim, tmp_path).exception(), OutputError)
    claim(tmp_path)


def test_an_error_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), claiming("output_dir", tmp_path):
        raise KeyboardInterrupt
    claim(tmp_path)


def test_a_fork_that_lives_longer_does_not_keep_the_folder(tmp_path):
    """As the workers of a data loader do after their process is killed, for some seconds."""
    (lives, tell), (waits, let_end) = os.pipe(), os.pipe()
    with claiming("output_dir", tmp_path):
        child = os.fork()
        if not child:
            os.close(let_end)
            os.write(tell, b".")
            os.read(waits, 1)
            os._exit(0)
    os.read(lives, 1)
    try:
        claim(tmp_path)
    finally:
        for end in (let_end, waits, lives, tell):
            os.close(end)
        os.waitpid(child, 0)


def test_a_folder_without_locks_is_open_to_all(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claiming("output_dir", tmp_path):
        claim(tmp_path)
    claim(tmp_path / "missing")
