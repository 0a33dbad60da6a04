"""A run file that is run again gives the same weights to the bit, and what has changed is named."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

import luthier
from luthier.cli import main
from luthier.config.load import load_train
from luthier.core.manifest import read_manifest, write_manifest
from luthier.workflow.rerun import hashes_of_model, models_of, quick_digest
from tests.small_world import small_world
from tests.tiny import tiny_llama

KEYS = {
    "finetuning_type": "lora",
    "lora_dropout": 0.1,
    "max_steps": 3,
    "disable_shuffling": False,
    "run_name": r"\${x}",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    values = small_world(tmp_path_factory.mktemp("world"))
    luthier.train({**values, **KEYS})
    return Path(values["output_dir"])


@pytest.fixture
def copied(original, tmp_path) -> Path:
    """A copy of the run with its own model and data, which a test may change. Its run file names them."""
    world = shutil.copytree(original.parent, tmp_path / "world")
    folder = world / "out"
    text = (folder / "run.yaml").read_text().replace(str(original.parent), str(world))
    (folder / "run.yaml").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text().replace(str(original.parent), str(world)))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def rerun(folder: Path, new: Path, *words: str) -> None:
    assert main(["train", str(folder / "run.yaml"), f"output_dir={new}", *words]) == 0


def changes(new: Path) -> list[str]:
    return read_manifest(new)["rerun_of"]["changes"]


def test_the_weights_are_the_same_to_the_bit(original, tmp_path, said):
    rerun(original, tmp_path / "new")
    names = ("adapter_model.safetensors", "run.yaml")
    there, here = (
        [(folder / name).read_text("latin-1").replace(str(folder), "") for name in names]
        for folder in (original, tmp_path / "new")
    )
    assert there == here and changes(tmp_path / "new") == []
    assert any("keys, model, data, versions and machine are the same" in text for text in said)
    assert any("the weights are the same to the bit" in text for text in said)


def test_what_was_read_is_recorded(original):
    manifest = read_manifest(original)
    (model, files), *others = manifest["read"]["models"].items()
    assert model == str(original.parent / "model") and not others
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    assert list(manifest["read"]["datasets"]) == ["numbers"] and len(manifest["read"]["datasets"]["numbers"]) == 1
    assert manifest["ran_on"]["processes"] == 1 and manifest["ran_on"]["threads"] == torch.get_num_threads()
    assert manifest["versions"]["torch"] == version("torch")


def test_a_changed_model_and_changed_data_are_named(copied, tmp_path, said):
    world = copied.parent
    tiny_llama(world / "model", seed=5, max_position_embeddings=1024)
    rows = json.loads((world / "data" / "numbers.json").read_text())
    (world / "data" / "numbers.json").write_text(json.dumps(rows[:-1]))
    rerun(copied, tmp_path / "new", "learning_rate=1e-3", "logging_steps=2")
    assert changes(tmp_path / "new") == [
        "learning_rate: 0.01 there, 0.001 here",
        f"model {world / 'model'}: model.safetensors",
        "data: the files of numbers",
    ]
    assert any("the weights may differ, since this has changed: learning_rate" in text for text in said)
    assert any(text.endswith("the weights differ") for text in said)


def test_other_versions_another_machine_and_number_of_processes_are_named(copied, tmp_path):
    """As in the manifest of a run elsewhere."""
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["ran_on"] |= {"cpu": "an abacus", "processes": 2, "device": "tpu", "accelerator": "a TPU"}
    manifest["read"]["rows"] = "other"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    rerun(copied, tmp_path / "new")
    found = changes(tmp_path / "new")
    here = read_manifest(tmp_path / "new")["ran_on"]
    assert sorted(found) == sorted(
        [
            "data: the rows, from the same files (the tokenizer, the chat format or the code that makes rows)",
            f"version of torch: 1.0 there, {version('torch')} here",
            f"cpu: an abacus there, {here['cpu']} here",
            f"device: tpu there, {here['device']} here",
            f"accelerator: a TPU there, {here.get('accelerator', 'none')} here",
            "processes: 2 there, 1 here",
        ]
    )


def test_a_manifest_of_an_earlier_version_says_so(copied, tmp_path, said):
    manifest = read_manifest(copied)
    write_manifest(copied, seed=manifest["seed"])
    rerun(copied, tmp_path / "new", "max_steps=1")
    assert any("does not say what that run read" in text for text in said)
    assert changes(tmp_path / "new") == ["max_steps: 3 there, 1 here"]


def test_other_run_files_are_no_reruns(original, tmp_path, said):
    """A copy of the file elsewhere, and the same folder."""
    keys = yaml.safe_load((original / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**keys, "max_steps": 1, "output_dir": str(tmp_path / "new")}))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert "rerun_of" not in read_manifest(tmp_path / "new") and not any("rerun of" in text for text in said)


def test_the_hashes_of_a_model(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    for name in (
        "model.safetensors",
        "config.json",
        "train_results.json",
        "README.md",
        "manifest.json",
        "trainer_log.jsonl",
    ):
        (tmp_path / name).write_text(name)
    assert list(hashes_of_model(str(tmp_path))) == ["config.json", "model.safetensors"]
    assert list(hashes_of_model(str(tmp_path / "config.json"))) == ["config.json"]
    assert hashes_of_model("nobody/nothing-of-this-name") == {}
    assert hashes_of_model("not a:name/at/all") == {}


def test_a_large_file_is_hashed_in_parts(tmp_path):
    """The file has holes, so it takes no disk; a change of its size, its beginning or its end is seen."""
    path, seen = tmp_path / "model.safetensors", set()
    for size, place in ((1 << 40, None), (1 << 40, 0), (1 << 40, (1 << 40) - 1), ((1 << 40) + 1, None), (5, None)):
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        seen.add(quick_digest(path))
    assert len(seen) == 5


def test_of_adapters_the_folder_inside_is_read(tmp_path):
    (tmp_path / "lora" / "inner").mkdir(parents=True)
    keys = {"model_name_or_path": "base", "output_dir": "out", "dataset": "rows", "stage": "sft", "do_train": True}
    keys |= {"adapter_name_or_path": str(tmp_path / "lora"), "ref_model_adapters": "org/on-a-hub"}
    assert list(models_of(load_train(keys))) == ["base", str(tmp_path / "lora"), "org/on-a-hub"]
    found = list(models_of(load_train({**keys, "adapter_folder": "inner"})))
    assert found == ["base", str(tmp_path / "lora" / "inner"), "org/on-a-hub"]
