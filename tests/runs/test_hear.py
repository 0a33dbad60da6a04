"""examples/hear.py: from random weights, a model learns to tell rising from falling tones that it has not heard."""

import importlib.util
from pathlib import Path

import pytest
import yaml

import luthier
from luthier.cli import main

pytest.importorskip("soundfile")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hear(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("hear", ROOT / "examples" / "hear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def prepare(hear, num_tones: int) -> dict:
    """Data and model where hear.yaml looks for them; returns its keys."""
    hear.write_data(hear.FOLDER / "data", hear.make(hear.FOLDER / "data" / "tones", num_tones, seed=0))
    hear.make_model(hear.FOLDER / "model")
    return yaml.safe_load((ROOT / "examples" / "hear.yaml").read_text(encoding="utf-8"))


def test_the_run_file_of_the_example_passes_the_check(hear, capsys):
    prepare(hear, 4)
    assert main(["check", str(ROOT / "examples" / "hear.yaml")]) == 0
    assert "fine" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_model_learns_to_tell_rising_from_falling(hear):
    keys = prepare(hear, hear.NUM_TONES)
    luthier.train(keys)
    unseen = hear.make(hear.FOLDER / "new", 60, seed=1)
    hear.silence(hear.FOLDER / "silence.wav")
    chat = luthier.chat({"model_name_or_path": keys["output_dir"], "temperature": 0, "max_new_tokens": 8})
    assert hear.share_right(chat, unseen, [row["audios"][0] for row in unseen]) >= 0.9
    assert hear.share_right(chat, unseen, [str(hear.FOLDER / "silence.wav")] * len(unseen)) <= 0.7
