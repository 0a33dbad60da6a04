"""A working folder with one dataset and run files, for tests of commands that load no model."""

import json
from pathlib import Path

import pytest

RUN = {
    "model_name_or_path": "m",
    "stage": "sft",
    "do_train": True,
    "dataset": "d",
    "template": "qwen",
    "output_dir": "o",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with one dataset in `data`."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    rows = [{"instruction": "Who are you?", "input": "", "output": "An assistant."}]
    (tmp_path / "data" / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("ALLOW_EXTRA_ARGS", "LUTHIER_DEBUG", "USE_RAY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(folder: Path, name: str = "run.yaml", **keys) -> str:
    path = folder / name
    path.write_text(json.dumps({**RUN, **keys}), encoding="utf-8")
    return str(path)
