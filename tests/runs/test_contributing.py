"""The files that CONTRIBUTING.md shows are added to a copy of the package, and a run uses all of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import luthier
from tests.small_world import small_world

PACKAGE = Path(luthier.__file__).parent
PAGE = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+\n# (luthier/\S+)\n(.*?)```", PAGE, flags=re.DOTALL))
"""Path -> content."""


def test_the_page_shows_a_file_for_each_kind():
    folders = {str(Path(name).parent).removeprefix("luthier/") for name in FILES}
    assert folders == {"data/templates", "data/formats", "training/optimizers", "model/adapters", "stages"}


@pytest.mark.thorough
def test_a_run_trains_with_all_of_them(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "luthier", ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    world = small_world(tmp_path / "world")
    data = Path(world["dataset_dir"])
    (data / "chats.jsonl").write_text(json.dumps({"turns": ["Hi", "Hello!", "Bye", "Bye!"]}) + "\n", "utf-8")
    info = json.loads((data / "dataset_info.json").read_text("utf-8"))
    info["chats"] = {"file_name": "chats.jsonl", "formatting": "dialog_list", "columns": {"messages": "turns"}}
    (data / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    keys = {"stage": "focal", "focal_gamma": 1.0, "finetuning_type": "norms", "use_nadam": True, "max_steps": 2}
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({**world, **keys, "dataset": "chats,numbers", "template": "acme"}), "utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    command = [sys.executable, "-m", "luthier", "train", str(run)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainable parameters: 320 of 115,008" in done.stderr
    assert "[USER] " in done.stderr and "[END]" in done.stderr
    assert (Path(world["output_dir"]) / "model.safetensors").is_file()
