"""`luthier plan RUN`: JSON with the keys of the contract, lines for readers, errors without a traceback."""

import json

import pytest

from luthier import cli
from tests.small_world import small_world


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    path = folder / "run.json"
    path.write_text(json.dumps({**small_world(folder), "finetuning_type": "lora"}), encoding="utf-8")
    return str(path)


def test_plan_prints_one_json_object(run_file, capsys):
    assert cli.main(["plan", run_file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"rows", "tokens", "steps", "parameters", "trainable_parameters", "peak_bytes", "seconds"}
    assert wanted <= found.keys() and found["rows"] == 24 and found["steps"] == 6
    assert found["trainable_parameters"] < found["parameters"] and found["peak_bytes"] > 10**8


def test_plan_prints_lines_and_takes_overrides(run_file, capsys):
    assert cli.main(["plan", run_file, "max_steps=3"]) == 0
    captured = capsys.readouterr()
    assert "3 steps" in captured.out and "peak memory" in captured.out and "data numbers: 24 rows" in captured.err


def test_plan_without_a_run_file_is_an_error(capsys):
    assert cli.main(["plan"]) == 2
    assert "which run file?" in capsys.readouterr().err


def test_a_run_without_a_model_of_its_memory_is_an_error(run_file, capsys):
    assert cli.main(["plan", run_file, "torch_compile=true"]) == 2
    message = capsys.readouterr().err
    assert "has no model" in message and "Traceback" not in message
