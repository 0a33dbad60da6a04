"""`rollout_backend: vllm`: answers of a server that has the weights of the policy are those of the policy itself.

The server is the stand-in of `tests.infer.servers`, which speaks as vLLM does: started by the run, or at an address.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import luthier
from luthier.cli import main
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, RunFailed
from luthier.core.ports import HOST, free_port
from luthier.infer.rollout_server import DEVELOPMENT, RolloutServer
from luthier.model.files.sources import model_source
from luthier.workflow import served_rollouts
from tests.infer.servers import stand_in
from tests.infer.servers.programs import processes_with, stand_in_for
from tests.small_world import WAYS, small_world
from tests.waiting import until

GRPO = {"stage": "grpo", "num_generations": 4, "rollout_backend": "vllm"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    own = Path(values["model_name_or_path"], "generation_config.json")
    settings = json.loads(own.read_text())
    own.write_text(json.dumps(settings | {"min_p": 0.004, "stop_strings": ["a", "e", "i"], "typical_p": 1.0}))
    return {
        **values,
        **GRPO,
        "cutoff_len": 100,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 0,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "reward_funcs": "tests.small_world:small_letters",
    }


def learned(values: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """What each step logged, but for the clock."""
    result = luthier.train({**values, "output_dir": str(folder)})
    lines = [logs for logs in result.log_history if "loss" in logs]
    return [{name: value for name, value in logs.items() if name != "throughput"} for logs in lines]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-3)


def test_a_server_that_the_run_starts_gets_the_adapter_before_each_rollout(world, tmp_path, monkeypatch):
    installed = stand_in_for("vllm", tmp_path / "vllm")
    for name, value in installed.environ.items():
        monkeypatch.setenv(name, value)
    keys = {**world, **WAYS["lora"], "rollout_gpu_util": 0.2}
    found = learned(keys, tmp_path / "out")
    expected = learned({**keys, "rollout_backend": "huggingface", "rollout_gpu_util": 0.3}, tmp_path / "alone")
    assert_same(found, expected)
    paths = [call["path"] for call in installed.calls if "path" in call]
    assert paths.count("/v1/load_lora_adapter") == 3 and paths.count("/v1/unload_lora_adapter") == 2
    assert paths.count("/v1/completions") == 3 * 8 and "--enable-lora" in installed.argv
    assert (installed.last_body["min_p"], installed.last_body["stop"]) == (0.004, ["a", "e", "i"])
    assert installed.argv[installed.argv.index("--gpu-memory-utilization") + 1] == "0.2"
    until(lambda: not processes_with(str(installed.folder)))
    assert not list((tmp_path / "out").glob("rollouts-*"))


@pytest.mark.thorough
def test_a_server_at_an_address_reloads_all_weights(world, tmp_path, monkeypatch):
    port, log = free_port(), tmp_path / "served"
    log.mkdir()
    words = [sys.executable, stand_in.__file__, "vllm", "serve", world["model_name_or_path"]]
    words += ["--host", HOST, "--port", str(port), "--max-model-len", "512"]
    environment = {**os.environ, **DEVELOPMENT, "STAND_IN_FOLDER": str(log), "VLLM_API_KEY": "k"}
    environment["PYTHONPATH"] = str(Path(stand_in.__file__).parents[3])
    monkeypatch.setenv("VLLM_API_KEY", "k")
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers_at(port))
            keys = {**world, **WAYS["full"], "learning_rate": 1e-3, "rollout_folder": str(tmp_path / "weights")}
            address = {"rollout_server": f"http://{HOST}:{port}"}
            found = learned({**keys, **address}, tmp_path / "out")
        finally:
            process.terminate()
    own = {name: value for name, value in keys.items() if name != "rollout_folder"}
    assert_same(found, learned({**own, "rollout_backend": "huggingface"}, tmp_path / "alone"))
    calls = [json.loads(line) for line in (log / "calls.jsonl").read_text().splitlines()]
    assert [call["path"] for call in calls].count("/collective_rpc") == 3
    assert not list((tmp_path / "weights").glob("rollouts-*"))


def test_a_model_on_the_hub_is_served_in_the_revision_that_is_trained(world, monkeypatch):
    """Else the adapter would be put beside other weights than those that it is trained on."""
    started = []

    class Recorded:
        def __init__(self, name, command, port, environ):
            started.append((command, environ))

        def wait_until_healthy(self):
            """It is at once."""

    keys = {"model_name_or_path": "owner/model", "model_revision": "v2", "cache_dir": "/cache", "hf_hub_token": "hf_1"}
    run = load_train({**world, **WAYS["lora"], **keys})
    monkeypatch.setattr(served_rollouts, "ChildServer", Recorded)
    monkeypatch.setattr(served_rollouts, "find_program", lambda name: "/bin/vllm")
    monkeypatch.setattr(RolloutServer, "open", lambda server: None)
    policy = SimpleNamespace(config=SimpleNamespace(dtype=None))
    args = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    served_rollouts._started(run, SimpleNamespace(source=model_source(run.model)), policy, args, 512)
    ((command, environ),) = started
    assert command[:3] == ["/bin/vllm", "serve", "owner/model"]
    assert command[command.index("--revision") + 1] == "v2"
    assert (environ["HF_HUB_CACHE"], environ["HF_TOKEN"]) == ("/cache", "hf_1")


def answers_at(port: int) -> bool:
    try:
        RolloutServer.at(f"http://{HOST}:{port}", "k")
    except RunFailed:
        return False
    return True


def test_a_server_that_does_not_answer_is_an_error_in_one_sentence(world, tmp_path, capsys):
    path = tmp_path / "run.json"
    keys = {**world, **WAYS["lora"], "rollout_server": f"http://{HOST}:{free_port()}", "output_dir": str(tmp_path)}
    path.write_text(json.dumps(keys), encoding="utf-8")
    assert main(["train", str(path)]) == 1
    message = capsys.readouterr().err
    assert "rollout_server: http://127.0.0.1:" in message and "nothing answers there" in message
    assert "vllm serve" in message and "Traceback" not in message


def test_without_vllm_the_run_does_not_begin(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("luthier.workflow.preflight.requirements.find_program", lambda name: None)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**world, **WAYS["lora"], "output_dir": str(tmp_path)}), encoding="utf-8")
    assert main(["train", str(path)]) == 2
    message = capsys.readouterr().err
    assert "rollout_backend" in message and "no program vllm" in message and "rollout_server" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rollout_server": "here:80"}, "rollout_server: 'here:80': is not the address of a server"),
        ({"rollout_server": "https://a/b"}, "is not the address of a server"),
        ({"rollout_server": "http://me:secret@a:1"}, "is not the address of a server"),
        ({"rollout_server": "http://a:1/?x=2"}, "is not the address of a server"),
        ({"quantization_bit": 4}, "quantization_bit: 4: the server would answer with weights that are not quantized"),
        ({"resize_vocab": True}, "resize_vocab: true: the server has no rows for new tokens"),
        ({"finetuning_type": "oft"}, "rollout_backend: 'vllm': serves LoRA adapters"),
        ({"rollout_gpu_util": 1.5}, "rollout_gpu_util: 1.5: must be from 0.01 to below 1"),
        ({"adapter_name_or_path": "a,b"}, "the server would answer without the adapters"),
        ({"rollout_backend": "huggingface", "rollout_server": "http://a:1"}, None),
    ],
)
def test_rules(world, keys, message):
    if message is None:
        warnings = [str(warning) for warning in load_train({**world, **WAYS["lora"], **keys}).warnings]
        assert any("rollout_server" in warning and "is not read" in warning for warning in warnings)
        return
    with pytest.raises(ConfigError, match=message):
        load_train({**world, **WAYS["lora"], **keys})
