"""Processes that Ray starts: equal to those of torchrun, started again from the checkpoint if one is killed."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from luthier.cli import main
from luthier.core.errors import InvalidInput
from luthier.core.manifest import verify_folder
from luthier.core.ports import free_port
from luthier.workflow.launch.ray import require_resources, resources_of, start_ray
from luthier.workflow.preflight import requirements
from tests.holding import Hold
from tests.small_world import small_world
from tests.waiting import until
from tests.working_folder import write

LIMIT_SECONDS = 400
TWO = {"ray_num_workers": 2, "ray_init_kwargs": {"address": "local", "num_cpus": 2}}
"""Without the address, Ray would join a cluster that another test has started."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("world"))
    more = {"finetuning_type": "lora", "lora_dropout": 0.1, "disable_shuffling": False, "max_steps": 4}
    return {**values, **more, "per_device_train_batch_size": 2, "learning_rate": 1e-3}


def test_without_ray_the_error_names_the_extra(folder, llama_folder, monkeypatch, capsys):
    monkeypatch.setenv("USE_RAY", "1")
    installed = requirements.is_installed
    monkeypatch.setattr(requirements, "is_installed", lambda module: module != "ray" and installed(module))
    assert main(["train", write(folder, model_name_or_path=str(llama_folder))]) == 2
    told = "environment: USE_RAY: needs the library ray, which is not installed -> pip install 'luthier[ray]'"
    assert told in capsys.readouterr().err


def test_what_each_process_gets(monkeypatch):
    from luthier.config.keys.ray import RayConfig

    assert resources_of(RayConfig(), {"CPU": 8.0}) == {"CPU": 1}
    assert resources_of(RayConfig(), {"CPU": 8.0, "GPU": 2.0}) == {"CPU": 1, "GPU": 1}
    assert resources_of(RayConfig(resources_per_worker={"GPU": 2}), {}) == {"CPU": 1, "GPU": 2}
    require_resources(2, {"CPU": 1, "GPU": 1}, {"CPU": 8.0, "GPU": 2.0})
    with pytest.raises(InvalidInput, match="4 processes with GPU: 1 each need 4, and the cluster has 2"):
        require_resources(4, {"CPU": 1, "GPU": 1}, {"CPU": 8.0, "GPU": 2.0})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_start_that_fails_is_no_run_that_ended_well():
    """Ray raises errors of its own kind for its workers only, not for a folder that cannot be written, for example."""
    pytest.importorskip("ray")
    from luthier.workflow.launch.ray import _fit

    class Trainer:
        def fit(self):
            raise PermissionError("no")

    assert isinstance(_fit(Trainer(), None), PermissionError)


def test_a_folder_whose_path_is_too_long_for_sockets_is_told(tmp_path):
    pytest.importorskip("ray")
    from luthier.config.keys.ray import RayConfig

    keys = RayConfig(ray_init_kwargs={"address": "local", "_temp_dir": str(tmp_path / ("x" * 90))})
    with pytest.raises(
        InvalidInput, match=r"USE_RAY=1: Ray cannot be started .*-> set TMPDIR to a folder with a short"
    ):
        start_ray(keys)


def start(values: dict, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    run_file = folder.with_suffix(".yaml")
    run_file.write_text(yaml.safe_dump({**values, "output_dir": str(folder)}))
    words = [sys.executable, "-m", "luthier", "train", str(run_file)]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TEST_FOLDER": str(folder), **environment}
    return subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def logged(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [logs["loss"] for logs in history if "loss" in logs]


@pytest.fixture(scope="module")
def of_torchrun(world, tmp_path_factory) -> Path:
    """What two processes of torchrun leave."""
    folder = tmp_path_factory.mktemp("torchrun") / "out"
    process = start(world, folder, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    _, told = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, told
    return folder


@pytest.mark.thorough
def test_two_workers_are_two_processes_of_torchrun(world, of_torchrun, tmp_path):
    """Losses and weights to the bit; the driver's log has the steps, and its stdout the metrics."""
    pytest.importorskip("ray")
    process = start({**world, **TWO}, tmp_path / "out", USE_RAY="1")
    printed, told = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, told
    assert logged(tmp_path / "out") == logged(of_torchrun)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (of_torchrun / name).read_bytes()
    assert "train_loss: " in printed and f"saved: {tmp_path / 'out'}" in printed
    assert "step 4/4  loss" in told
    assert not Path(f"{tmp_path / 'out'}.ray").exists()


@pytest.mark.thorough
def test_a_killed_process_starts_all_of_them_again_from_the_checkpoint(world, of_torchrun, tmp_path):
    """Also with overwrite_output_dir, which is for the start of the run and not for its restart."""
    pytest.importorskip("ray")
    folder = tmp_path / "out"
    values = {**world, **TWO, "save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": True}

    hold = Hold(tmp_path, "out/checkpoint-3")

    def kill_one() -> None:
        until(lambda: hold.holds)
        os.kill(processes_of(folder)[-1], signal.SIGKILL)
        hold.release()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    process = start(values, folder, USE_RAY="1", **hold.environment)
    _, told = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, told
    assert not killer.is_alive() and "resuming from" in told
    assert logged(folder) == logged(of_torchrun)
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (of_torchrun / name).read_bytes()


@pytest.mark.thorough
def test_an_error_of_the_user_is_told_once_and_not_tried_again(world, tmp_path):
    """No row is left after tokenization, which no check of the run file can know."""
    pytest.importorskip("ray")
    data = Path(world["dataset_dir"])
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "empty.json").write_text(json.dumps([{"instruction": "x" * 900, "input": "", "output": "y"}]))
    (data / "dataset_info.json").write_text(json.dumps({**info, "empty": {"file_name": "empty.json"}}))
    values = {**world, "dataset": "empty", "on_overlong": "drop", "cutoff_len": 32, "ray_num_workers": 1}
    process = start({**values, "ray_init_kwargs": {"address": "local", "num_cpus": 1}}, tmp_path / "out", USE_RAY="1")
    _, told = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2, told
    assert "\nluthier: dataset 'empty' has no usable row" in told and "Training failed" not in told


@pytest.mark.thorough
def test_ctrl_c_saves_a_checkpoint_on_a_cluster_that_is_named(world, tmp_path):
    pytest.importorskip("ray")
    port, folder = free_port(), tmp_path / "out"
    words = ["start", "--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    words = [sys.executable, "-m", "ray.scripts.scripts", *words]
    cluster = subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, **token})
    try:
        until(lambda: cluster.poll() is not None or answers(port))
        assert cluster.poll() is None
        more = {"ray_num_workers": 2, "ray_init_kwargs": {"address": f"127.0.0.1:{port}"}, "max_steps": 20000}
        process = start({**world, **more}, folder, USE_RAY="1", **token)
        until(lambda: (folder / "trainer_log.jsonl").is_file() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        cluster.terminate()
        cluster.wait()
    assert process.returncode == 130, told
    (checkpoint,) = folder.glob("checkpoint-*")
    assert verify_folder(checkpoint) == [] and f"stopped: {checkpoint} is saved" in told


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_of(folder: Path) -> list[int]:
    """The processes that train for the test with this folder, by their RANK."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((int(item[5:]) for item in environment if item.startswith(b"RANK=")), None)
        is_of_test = f"TEST_FOLDER={folder}".encode() in environment
        if b"luthier.workflow.launch.child" in words and is_of_test and rank is not None:
            found[rank] = int(path.name)
    return [found[rank] for rank in sorted(found)]
