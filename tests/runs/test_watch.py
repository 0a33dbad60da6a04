"""examples/watch.py: from random weights, a model learns where a dot goes in videos that it has not seen."""

import importlib.util
from pathlib import Path

import pytest
import yaml

import luthier
from luthier.cli import main

pytest.importorskip("torchvision")
pytest.importorskip("av")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def watch(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("watch", ROOT / "examples" / "watch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def prepare(watch, num_videos: int) -> dict:
    """Data and model where watch.yaml looks for them; returns its keys."""
    watch.write_data(watch.FOLDER / "data", watch.make(watch.FOLDER / "data" / "frames", num_videos, seed=0))
    watch.make_model(watch.FOLDER / "model")
    return yaml.safe_load((ROOT / "examples" / "watch.yaml").read_text(encoding="utf-8"))


def test_the_run_file_of_the_example_passes_the_check(watch, capsys):
    prepare(watch, 4)
    assert main(["check", str(ROOT / "examples" / "watch.yaml")]) == 0
    assert "fine" in capsys.readouterr().out


def test_the_control_has_each_order_and_its_reverse(watch):
    rows = [{"messages": [], "videos": [list("abcd")]}, {"messages": [], "videos": [list("efgh")]}]
    mixed = [row["videos"][0] for row in watch.shuffled(rows, seed=2)]
    assert ["".join(sorted(one)) for one in mixed] == ["abcd", "abcd", "efgh", "efgh"]
    assert all(one == other[::-1] for one, other in zip(mixed[::2], mixed[1::2], strict=True))


@pytest.mark.thorough
def test_a_model_learns_where_a_dot_goes(watch):
    keys = prepare(watch, watch.NUM_VIDEOS)
    luthier.train(keys)
    unseen = watch.make(watch.FOLDER / "new", 60, seed=1)
    chat = luthier.chat({"model_name_or_path": keys["output_dir"], "temperature": 0, "max_new_tokens": 8})
    assert watch.share_right(chat, unseen) >= 0.9
    assert watch.share_right(chat, watch.shuffled(unseen, seed=2)) <= 0.6
