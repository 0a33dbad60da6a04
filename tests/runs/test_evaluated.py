"""`luthier eval` as a process that SIGKILL ends: the same command ends with the files of a run that was not killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from luthier import cli
from tests.evals.small_benchmark import write_benchmark
from tests.tiny import tiny_llama

SECONDS = 180


@pytest.mark.thorough
def test_a_killed_evaluation_goes_on(tmp_path):
    write_benchmark(tmp_path)
    model = tiny_llama(tmp_path / "model", max_position_embeddings=2048, num_hidden_layers=8, hidden_size=256)
    keys = (f"model_name_or_path={model}", "template=default", "task=mmlu_test", f"task_dir={tmp_path}", "batch_size=1")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", "eval", *keys, f"save_dir={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines, end = folder / "results.jsonl", time.monotonic() + SECONDS
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder / "summary.json").exists()
    for save_dir in (folder, tmp_path / "whole"):
        assert cli.main(["eval", *keys, f"save_dir={save_dir}"]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["results.json", "results.jsonl", "results.log", "run.json", "summary.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
