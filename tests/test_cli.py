"""The command line from outside: exit statuses, what goes to stdout and stderr, and what is never imported."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import luthier
from luthier import cli
from luthier.core.errors import RunFailed
from tests.working_folder import RUN, write

ROOT = Path(luthier.__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "pyarrow",
    "rich",
    "pydantic",
    "peft",
    "accelerate",
    "huggingface_hub",
)


def luthier_process(*words, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "luthier", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_help_lists_every_command(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(words, capsys):
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"luthier {luthier.__version__}\n"


def test_names_of_the_reference_start_the_same_program():
    """Its scripts say `llamafactory-cli`, or `lmf` for short."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == dict.fromkeys(("luthier", "llamafactory-cli", "lmf"), "luthier.cli:main")


@pytest.mark.parametrize(("level", "status"), [("LOUD", 2), ("warning", 0), ("", 0)])
def test_a_level_of_the_log_that_does_not_exist(level, status):
    done = luthier_process("explain", "lora_rank", LLAMAFACTORY_VERBOSITY=level)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert ("LLAMAFACTORY_VERBOSITY: 'LOUD': there is no such level" in done.stderr) == (status == 2)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"luthier {name}" in capsys.readouterr().out or name in ("help", "version")
    assert cli.main(["help", name]) == 0


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"version", "help"}))
def test_each_command_has_its_module(name):
    import importlib

    assert callable(importlib.import_module(f"luthier.run.{name}").main)


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    captured = capsys.readouterr()
    assert "did you mean `train`" in captured.err and captured.out == ""
    assert cli.main(["xyzzy"]) == 2 and "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "remedy"), [("sft", "`train` with stage: sft"), ("rm", "`train` with stage: rm"), ("merge", "`export`")]
)
def test_a_command_of_v1_names_the_command_here(name, remedy, capsys):
    assert cli.main([name, "run.yaml"]) == 2
    assert capsys.readouterr().err.rstrip() == f"luthier: `{name}` is a command of v1 of LLaMA-Factory -> use {remedy}"


def test_windows_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main(["check", "run.yaml"]) == 2
    assert "WSL" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch):
    """Makes `luthier verify` call the given function."""
    import luthier.run.verify

    return lambda function: monkeypatch.setattr(luthier.run.verify, "main", function)


def test_a_run_that_fails_exits_1(command, capsys):
    def fail(argv):
        raise RunFailed("the disk is full")

    command(fail)
    assert cli.main(["verify", "x"]) == 1
    assert capsys.readouterr().err == "luthier: the disk is full\n"


def test_a_traceback_is_shown_when_asked_for(command, capsys, monkeypatch):
    def fail(argv):
        raise RunFailed("the disk is full")

    command(fail)
    monkeypatch.setenv("LUTHIER_DEBUG", "1")
    assert cli.main(["verify", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_130(command, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    command(interrupt)
    assert cli.main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "luthier: interrupted\n"


def test_a_fault_of_our_own_is_not_hidden(command):
    def fail(argv):
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["verify", "x"])


def test_a_reader_that_leaves_early_is_no_error():
    words = f"{sys.executable} -m luthier schema | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_exit_status_of_the_process(folder):
    assert luthier_process("version").returncode == 0
    done = luthier_process("check", write(folder, lora_rnk=8), cwd=folder)
    assert done.returncode == 2 and done.stderr.startswith("luthier: ") and done.stdout == ""
    assert luthier_process("nonsense").returncode == 2


CODE = """
import sys
from luthier import cli
status = cli.main(sys.argv[1:])
print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["version"], 0),
        (["--help"], 0),
        (["train", "--help"], 0),
        (["check", "good.yaml"], 0),
        (["check", "wrong.yaml"], 2),
        (["explain", "lora_rank"], 0),
        (["schema"], 0),
        (["train", "wrong.yaml"], 2),
        (["chat", "wrong.yaml"], 2),
    ],
)
def test_nothing_heavy_is_imported(folder, words, status):
    write(folder, "good.yaml")
    write(folder, "wrong.yaml", lora_rnk=8)
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(heavy=HEAVY), *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_version_imports_next_to_nothing():
    code = "import sys; before = set(sys.modules); from luthier import cli; cli.main(['version']); "
    code += "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - {'luthier', 'typing'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert not any(name in loaded for name in ("yaml", "dataclasses", "pathlib", "logging", "argparse")), loaded


def test_the_python_functions_take_what_a_run_file_holds(monkeypatch):
    import luthier.workflow.chat
    import luthier.workflow.export
    import luthier.workflow.training

    monkeypatch.setattr(luthier.workflow.training, "train", lambda run: run)
    monkeypatch.setattr(luthier.workflow.export, "export", lambda run: run)
    monkeypatch.setattr(luthier.workflow.chat, "open_chat", lambda run: run)
    assert luthier.train({**RUN, "lora_rank": 4}).adapter.lora_rank == 4
    assert luthier.export({"model_name_or_path": "m", "export_dir": Path("e")}).export.export_dir == "e"
    assert luthier.chat({"model_name_or_path": "m", "top_k": 3}).generating.top_k == 3
    with pytest.raises(ValueError, match="lora_rnk"):
        luthier.train({**RUN, "lora_rnk": 4})


def test_the_python_functions_tell_what_they_do_not_read(monkeypatch, said):
    import luthier.workflow.chat
    import luthier.workflow.comparison
    import luthier.workflow.export

    monkeypatch.setattr(luthier.workflow.export, "export", lambda run: run)
    monkeypatch.setattr(luthier.workflow.comparison, "evaluate", lambda run: run)
    monkeypatch.setattr(luthier.workflow.chat, "open_chat", lambda run: run)
    luthier.export({"model_name_or_path": "m", "export_dir": "e", "top_k": 3})
    luthier.chat({"model_name_or_path": "m", "export_size": 3})
    luthier.evaluate({"model_name_or_path": "m", "task": "perplexity", "dataset": "d", "export_size": 3})
    assert [line.partition(":")[2].split(": ")[1] for line in said] == ["top_k", "export_size", "export_size"]


def test_help_about_a_command_that_is_none(capsys):
    assert cli.main(["help", "trian"]) == 2
    assert "unknown command `trian`; did you mean `train`?" in capsys.readouterr().err
