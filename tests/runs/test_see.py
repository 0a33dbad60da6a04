"""examples/see.py: from random weights, a model learns to name the colors of images that it has not seen."""

import importlib.util
from pathlib import Path

import pytest
import yaml

import luthier
from luthier.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def see(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("see", ROOT / "examples" / "see.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def prepare(see, num_images: int, *answers: str) -> dict:
    """Data and model where see.yaml looks for them; returns its keys."""
    see.write_data(see.FOLDER / "data", see.draw(see.FOLDER / "data" / "images", num_images, seed=0, answers=answers))
    see.make_model(see.FOLDER / "model")
    return yaml.safe_load((ROOT / "examples" / "see.yaml").read_text(encoding="utf-8"))


def test_the_run_file_of_the_example_passes_the_check(see, capsys):
    prepare(see, 4, "color", "shape")
    assert main(["check", str(ROOT / "examples" / "see.yaml")]) == 0
    assert "fine" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_model_learns_colors_and_answers_by_looking(see):
    keys = prepare(see, 480, "color")
    luthier.train({**keys, "max_steps": 150, "warmup_steps": 10})
    unseen = see.draw(see.FOLDER / "new", 40, seed=1, answers=("color",))
    black = see.FOLDER / "black.png"
    see.black(black)
    chat = luthier.chat({"model_name_or_path": keys["output_dir"], "temperature": 0, "max_new_tokens": 12})
    assert see.share_right(chat, unseen, [row["images"][0] for row in unseen]) >= 0.95
    assert see.share_right(chat, unseen, [str(black)] * len(unseen)) <= 0.4
