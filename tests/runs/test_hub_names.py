"""A model and an adapter named as on the hub serve every command like their folders."""

import json
from pathlib import Path

import pytest

import luthier
from luthier.cli import main
from tests.hub_cache import put_into_cache
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With `someone/model`, and `someone/adapter` trained on it."""
    folder = tmp_path_factory.mktemp("world")
    values = {**small_world(folder), "finetuning_type": "lora", "max_steps": 2, "cache_dir": str(folder / "cache")}
    put_into_cache(Path(values["model_name_or_path"]), "someone/model", folder / "cache")
    values["model_name_or_path"] = "someone/model"
    luthier.train({**values, "output_dir": str(folder / "adapter")})
    put_into_cache(folder / "adapter", "someone/adapter", folder / "cache")
    return values


@pytest.fixture
def infers(world):
    names = ("model_name_or_path", "cache_dir", "template")
    return {**{name: world[name] for name in names}, "adapter_name_or_path": "someone/adapter"}


def test_an_adapter_names_its_base_as_the_run_does(world):
    adapter = Path(world["cache_dir"]).parent / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/model"


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter_name_or_path": "someone/adapter"},
        {"stage": "dpo", "dataset": "pairs", "ref_model": "someone/model", "ref_model_adapters": "someone/adapter"},
    ],
    ids=["continued", "reference"],
)
def test_training(world, tmp_path, keys):
    assert luthier.train({**world, **keys, "output_dir": str(tmp_path)}).metrics["train"]["train_loss"] > 0


def test_chat(infers, said):
    answer = luthier.chat({**infers, "max_new_tokens": 1}).ask("hi")
    assert answer is not None
    assert not [line for line in said if "cannot be read" in line], "a model of text is not asked for images"


def test_export(infers, tmp_path):
    luthier.export({**infers, "export_dir": str(tmp_path / "merged")})
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("command", ["check", "data", "plan"])
def test_commands_before_training(world, tmp_path, command, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**world, "adapter_name_or_path": "someone/adapter", "output_dir": str(tmp_path / "o")}))
    assert main([command, str(file)]) == 0, capsys.readouterr()
