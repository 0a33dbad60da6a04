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


def test_plan_tells_what_has_no_effect(run_file, capsys):
    assert cli.main(["plan", run_file, "warmup_steps=2", "warmup_ratio=0.1"]) == 0
    assert "warmup_ratio: '0.1': is not read" in capsys.readouterr().err


def test_plan_without_a_run_file_is_an_error(capsys):
    assert cli.main(["plan"]) == 2
    assert "which run file?" in capsys.readouterr().err


def test_a_run_without_a_model_of_its_memory_is_an_error(run_file, capsys):
    assert cli.main(["plan", run_file, "torch_compile=true"]) == 2
    message = capsys.readouterr().err
    assert "has no model" in message and "Traceback" not in message


def test_a_table_compares_engines_of_a_model_without_weights(tmp_path, capsys):
    values = small_world(tmp_path)
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**values, "bf16": True}), encoding="utf-8")
    assert cli.main(["plan", str(path), "--processes=2,8", "--accelerator", "16GiB", "--table"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows][:2] == [("| 2", "ddp"), ("| 2", "zero1")] and len(rows) == 10
    assert rows[-1][:2] == ["| 8", "fsdp2"] and all(row[9] == "yes" for row in rows)


@pytest.mark.parametrize(("key", "engine"), [("sp_size", "ddp"), ("tp_size", "tp")])
def test_as_many_processes_as_share_a_row_or_a_layer(run_file, capsys, key, engine):
    assert cli.main(["plan", run_file, f"{key}=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["processes"]) == (engine, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sp_size=2", "--processes", "3"], "2 processes share the tokens of a batch, and there are 3 processes"),
        (["tp_size=2", "--processes", "4"], "2 processes share each layer, and there are 4 processes"),
        (["tp_size=2", "--table", "--processes", "2"], "--table compares engines, and tp_size is one itself"),
        (["--processes", "0"], "'0' is not a number of processes"),
        (["--processes", "2,8"], "several numbers make a table"),
        (["--table"], "--table compares engines"),
        (["--table", "--json", "--processes", "2"], "two output formats"),
        (["--accelerator", "80"], "'80' is not a size of memory"),
        (["--processes"], "--processes needs a value"),
    ],
)
def test_options_that_are_not_well_formed(run_file, capsys, words, message):
    assert cli.main(["plan", run_file, *words]) == 2
    assert message in capsys.readouterr().err
