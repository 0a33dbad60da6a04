"""Signals during training, sent to a real process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import representatives

ROOT = Path(__file__).parents[3]
ENDLESS: dict[str, Any] = {"max_steps": 100_000}


class Training:
    """A training process."""

    def __init__(self, run_file: str, num_processes: int) -> None:
        command = [sys.executable, "-m", "luthier", "train", run_file]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if num_processes > 1:
            environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(num_processes)}
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said: list[str] = []

    def says(self, words: str) -> None:
        """Waits for a line that holds the words."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return
        pytest.fail(f"ended without a word of {words!r}:\n{''.join(self.said)}")

    def gets(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self) -> tuple[int, str, str]:
        """(status, stdout, stderr)"""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, "".join(self.said) + err


@pytest.fixture
def start(person) -> Iterator[Any]:
    running: list[Training] = []

    def begin(num_processes: int = 1, **changes: Any) -> Training:
        running.append(Training(person.run_file(**changes), num_processes))
        return running[-1]

    yield begin
    for training in running:
        training.process.kill()
        training.process.wait()


@pytest.mark.parametrize(
    ("number", "num_processes"),
    representatives([(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)], (signal.SIGINT, 1)),
)
def test_a_signal_saves_a_checkpoint_to_resume_from(person, start, number, num_processes):
    """torchrun passes it on; its processes get it in different steps and stop after the same one."""
    training = start(num_processes, **ENDLESS)
    training.says("step 3/")
    training.gets(number)
    status, out, err = training.ends()
    assert status == 130, err
    assert out == ""
    assert "Traceback" not in err
    (checkpoint,) = person.out.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"stopped: {checkpoint} is saved -> run the same command to resume" in err
    assert person.types("verify", str(checkpoint)).status == 0
    assert not list(person.out.glob("*.safetensors")), "nothing that looks like a finished model"
    outcome = person.trains(max_steps=step + 2)
    assert outcome.status == 0, outcome.err
    assert f"resuming from {checkpoint}" in outcome.err
    assert person.types("verify", str(person.out)).status == 0


def is_training(out: Path) -> bool:
    heartbeat = out / "heartbeat.json"
    return heartbeat.exists() and json.loads(heartbeat.read_text())["phase"] == "training"


@pytest.mark.thorough
def test_a_second_signal_stops_at_once(person, start):
    """One step would take minutes; the checkpoint of an earlier run is left as it was."""
    rows = [{"instruction": f"Say {number}", "output": "x" * 600} for number in range(6000)]
    keys = person.dataset(json.dumps(rows))
    assert person.trains(**keys, max_steps=1, save_strategy="steps", save_steps=1).status == 0
    training = start(**ENDLESS, **keys, gradient_accumulation_steps=1400)
    training.says("resuming from")
    while not is_training(person.out):
        assert training.process.poll() is None
        time.sleep(0.02)
    training.gets(signal.SIGINT)
    training.says("press Ctrl-C again to stop at once")
    assert training.process.poll() is None, "the step goes on"
    training.gets(signal.SIGINT)
    status, _, err = training.ends()
    assert status == 130, err
    assert err.endswith("luthier: interrupted\n")
    assert "Traceback" not in err
    assert [path.name for path in person.out.glob("*checkpoint*")] == ["checkpoint-1"]
    assert person.types("verify", str(person.out / "checkpoint-1")).status == 0


@pytest.mark.thorough
def test_a_signal_before_training_begins(start):
    training = start(**ENDLESS)
    training.says("the end token is")
    training.gets(signal.SIGINT)
    status, out, err = training.ends()
    assert (status, out) == (130, "")
    assert "Traceback" not in err
