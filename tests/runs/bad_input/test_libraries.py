"""Optional libraries that are missing, and machines that lack something: told before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BLOCKER = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else find_spec(name, path, target)


PathFinder.find_spec = find_others
"""
"""As sitecustomize.py on the path: these libraries are not there, wherever they are installed."""


@pytest.mark.parametrize(
    ("keys", "library", "remedy"),
    [
        ({"report_to": "wandb"}, "wandb", "pip install wandb"),
        ({"report_to": ["none", "comet_ml"]}, "comet_ml", "pip install comet-ml"),
        ({"plot_loss": True}, "matplotlib", "pip install 'luthier[plot]'"),
        ({"deepspeed": "ds.json"}, "deepspeed", "pip install 'luthier[deepspeed]'"),
        ({"predict_with_generate": True, "do_predict": True, "val_size": 2}, "nltk", "pip install 'luthier[metrics]'"),
    ],
)
def test_missing_library(person, keys, library, remedy):
    (person.folder / "path").mkdir()
    (person.folder / "path" / "sitecustomize.py").write_text(BLOCKER.format(blocked={library}))
    path = os.pathsep.join([str(person.folder / "path"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "luthier", "train", person.run_file(**keys)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("luthier: ") == 1
    before = done.stderr[: done.stderr.index("luthier: ")].splitlines()
    assert all(line.startswith("warning: ") for line in before)
    assert f"needs the library {library}, which is not installed -> {remedy}" in done.stderr
    assert not person.out.exists()


def test_half_precision_on_a_cpu(person):
    from luthier.core.machine import detect

    if detect().device != "cpu":
        pytest.skip("this machine has an accelerator")
    said = person.is_refused(fp16=True)
    assert "fp16: true: half precision training needs an accelerator, and this machine has none -> bf16: true" in said


def test_an_optimizer_whose_library_is_missing(person):
    said = person.is_refused(optim="galore_adamw", optim_target_modules="all-linear")
    assert "optim: 'galore_adamw': needs the library galore_torch" in said
    assert "set use_galore: true, which needs no library" in said


@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config", "accelerator_config"])
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("no_such.json", None, "no such file -> correct the path of the JSON file"),
        ("sub\\a.json", None, "no such file -> write it as "),
        ("a.json", "{", "not JSON ("),
        ("a.json", "[1]", "must hold a JSON object"),
        (".", None, "cannot be read (Is a directory)"),
    ],
)
def test_a_file_of_settings_that_cannot_be_read(person, key, name, text, words):
    path = person.folder / name
    if text is not None:
        path.write_text(text)
    said = person.is_refused(**{key: str(path)})
    assert f"{key}: {str(path)!r}: {words}" in said


def test_settings_of_fsdp_are_checked_before_anything_is_loaded(person):
    said = person.is_refused(fsdp=["full_shrad"], fsdp_config={"fsdp_ofload_params": True})
    assert "fsdp: ['full_shrad']: full_shrad is not a word of FSDP -> did you mean full_shard?" in said
    assert "fsdp_ofload_params is not a setting of FSDP -> did you mean offload_params?" in said


def test_fsdp_in_one_process(person):
    assert "FORCE_TORCHRUN=1, or leave fsdp out" in person.trains(fsdp="full_shard").complaint(2)


def test_a_hub_that_is_not_in_reach(person, monkeypatch):
    said = person.trains(push_to_hub=True).complaint(1)
    assert "push_to_hub: the repository cannot be created (" in said
    assert "leave push_to_hub out" in said
