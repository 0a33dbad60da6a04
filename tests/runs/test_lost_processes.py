"""Processes and machines that die while others train: the run ends and says which one, or goes on where it stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

import luthier
from luthier.core.ports import free_port
from tests.holding import Hold
from tests.small_world import losses, small_world
from tests.waiting import until

PATIENCE_SECONDS = 900
LAUNCH = [sys.executable, "-m", "luthier", "train"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {
        **small_world(tmp_path_factory.mktemp("world")),
        "finetuning_type": "lora",
        "learning_rate": 1e-3,
        "disable_shuffling": False,
        "overwrite_output_dir": False,
        "ddp_timeout": 180000000,
    }


@contextmanager
def started(run_file: Path, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`luthier train` with torchrun. All that is left of it is killed at the end."""
    names = {**os.environ, "OMP_NUM_THREADS": "1", "FORCE_TORCHRUN": "1", **environment}
    with log.open("ab") as file:
        launcher = subprocess.Popen([*LAUNCH, str(run_file)], env=names, stdout=file, stderr=file)
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def process_of(launcher: "subprocess.Popen[bytes]", rank: int) -> psutil.Process:
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.Error):  # some live for a moment only
            if child.environ().get("RANK") == str(rank) and "luthier.workflow.launch.child" in child.cmdline():
                return child
    raise AssertionError(f"there is no process {rank}")


@pytest.mark.thorough
def test_a_process_that_dies_ends_the_run_and_is_named(world, tmp_path):
    run_file, log, out = tmp_path / "run.yaml", tmp_path / "log", tmp_path / "out"
    run_file.write_text(yaml.safe_dump({**world, "max_steps": 100_000, "output_dir": str(out)}))
    with started(run_file, log, NPROC_PER_NODE="2") as launcher:
        until(lambda: (out / "trainer_log.jsonl").is_file())
        killed = process_of(launcher, 1)
        killed.send_signal(signal.SIGKILL)
        assert launcher.wait(PATIENCE_SECONDS) == 1
    told = log.read_text()
    assert f"luthier: rank 1 was ended by SIGKILL (process 1 of this machine, pid {killed.pid})" in told
    assert "process 0 of this machine was in " in told and "stderr.log" in told
    assert "Traceback" not in told


@pytest.mark.thorough
def test_a_machine_that_is_killed_and_comes_back_changes_nothing(world, tmp_path):
    """Two launchers on this machine are two nodes. The second one is killed, and started again."""
    steps = {"max_steps": 60, "save_strategy": "steps", "save_steps": 5}
    alone = luthier.train(
        {**world, "max_steps": 60, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "1")}
    )
    run_file, out = tmp_path / "run.yaml", tmp_path / "out"
    run_file.write_text(yaml.safe_dump({**world, **steps, "per_device_train_batch_size": 2, "output_dir": str(out)}))
    port, hold = str(free_port()), Hold(tmp_path, "out/checkpoint-15")
    nodes = {"RDZV_ID": "run", "MIN_NNODES": "2", "MAX_NNODES": "2", "MAX_RESTARTS": "3", "NPROC_PER_NODE": "1"}
    nodes |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **hold.environment}
    logs = [tmp_path / name for name in ("first.log", "second.log", "third.log")]
    with started(run_file, logs[0], **nodes) as first:
        until(lambda: answers(int(port)))  # the first one holds the meeting point
        with started(run_file, logs[1], **nodes):
            until(lambda: hold.holds)
        hold.release()
        with started(run_file, logs[2], **nodes) as again:
            assert [first.wait(PATIENCE_SECONDS), again.wait(PATIENCE_SECONDS)] == [0, 0], logs[0].read_text()
    assert "resuming from" in logs[0].read_text()
    state = json.loads((out / "trainer_state.json").read_text())
    found = [logged["loss"] for logged in state["log_history"] if "loss" in logged]
    assert found == pytest.approx(losses(alone), abs=1e-5)
    both, one = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "1"))
    assert all((both[name] - one[name]).abs().max() < 1e-4 for name in one)
