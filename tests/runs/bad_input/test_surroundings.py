"""What surrounds the program: streams that are closed, full or narrow, a folder that is gone, `~` in a path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line in which LUTHIER stands for the program."""
    line = line.replace("LUTHIER", f"{sys.executable} -m luthier")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, env=variables, capture_output=True, encoding="utf-8", check=False
    )
    assert "Traceback" not in done.stderr
    return done


def test_standard_output_is_full(person):
    for words in ("version", f"check {person.run_file()}"):
        done = shell(f"LUTHIER {words} > /dev/full", person.folder)
        assert done.returncode == 1
        assert (
            done.stderr == "luthier: standard output: cannot be written (No space left on device) -> free some space\n"
        )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(person, closed):
    assert shell(f"LUTHIER check run.yaml {closed}", Path(person.run_file()).parent).returncode == 0
    assert shell(f"LUTHIER check nothing.yaml {closed}", person.folder).returncode == 2


def test_a_reader_that_leaves(person):
    assert shell("LUTHIER explain lora_rank | true", person.folder).stderr == ""


def test_a_terminal_that_cannot_spell_what_is_written(person):
    person.run_file(dataset_dir=str(person.folder / "模型"))
    done = shell("LUTHIER check run.yaml", person.folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "\\u6a21\\u578b" in done.stderr
    done = shell("LUTHIER template show qwen", person.folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_gone(person):
    line = "mkdir gone && cd gone && rmdir ../gone && LUTHIER check run.yaml"
    done = shell(line, person.folder)
    assert done.returncode == 2
    assert done.stderr == "luthier: the current folder no longer exists -> change to another one\n"


def test_home_in_a_path(person, monkeypatch):
    monkeypatch.setenv("HOME", str(person.world))
    keys = {"model_name_or_path": "~/model", "dataset_dir": "~/data"}
    monkeypatch.chdir(person.folder)
    assert person.types("check", person.run_file(**keys)).out.endswith("fine (stage sft, full)\n")
    monkeypatch.setenv("HOME", str(person.folder))
    outcome = person.trains(output_dir="~/my out", max_steps=1)
    assert outcome.status == 0, outcome.err
    assert (person.folder / "my out" / "manifest.json").is_file()
    assert not (person.folder / "~").exists()
