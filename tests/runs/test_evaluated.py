"""`luthier eval` as a process that SIGKILL ends: the same command ends with the files of a run that was not killed."""

import os
import signal
from functools import partial

import pytest

from luthier import cli
from luthier.evals.results import ResultsFolder
from tests import killable
from tests.evals.small_benchmark import write_benchmark
from tests.tiny import tiny_llama


@pytest.mark.thorough
def test_a_killed_evaluation_goes_on(tmp_path):
    write_benchmark(tmp_path)
    model = tiny_llama(tmp_path / "model", max_position_embeddings=2048, num_hidden_layers=8, hidden_size=256)
    keys = {"model_name_or_path": str(model), "template": "default", "task": "mmlu_test", "task_dir": str(tmp_path)}
    keys["batch_size"] = 1
    folder, log = tmp_path / "killed", tmp_path / "log"
    changes = partial(killable.at_call, ResultsFolder, "add", 3, partial(os.kill, 0, signal.SIGKILL))
    process = killable.start({**keys, "save_dir": str(folder)}, log, command="eval", changes=changes)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert (folder / "results.jsonl").read_bytes().count(b"\n") >= 2 and not (folder / "summary.json").exists()
    for save_dir in (folder, tmp_path / "whole"):
        words = [f"{key}={value}" for key, value in keys.items()]
        assert cli.main(["eval", *words, f"save_dir={save_dir}"]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["results.json", "results.jsonl", "results.log", "run.json", "summary.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
