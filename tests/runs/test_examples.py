"""Every run file of examples/ passes `luthier check` as it is, and runs to its end on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from luthier.run.check import guess_kind
from tests.matrix import representatives
from tests.tiny import tiny_llama
from tools import preference_data

ROOT = Path(__file__).resolve().parents[2]
MADE = ("see.yaml", "hear.yaml", "watch.yaml")
"""Their models are made by the scripts beside them: tests/runs/test_see.py, test_hear.py, test_watch.py."""
FILES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml") if path.name not in MADE)
KEYS: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((ROOT / "examples" / name).read_text(encoding="utf-8")) for name in FILES
}
KINDS = {name: guess_kind(keys) for name, keys in KEYS.items()}
BASE = "models/SmolLM2-135M-Instruct.gguf"
SMALL = ("max_steps=2", "logging_steps=1", "eval_steps=1", "save_steps=1", "max_new_tokens=8")


@pytest.fixture(autouse=True)
def in_project_root(monkeypatch):
    """The paths in the examples are those of a person who stands in the project's folder."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Path in the examples -> what stands in its place: a tiny model, and what quickstart and export make of it."""
    folder = tmp_path_factory.mktemp("examples")
    places = {
        BASE: str(tiny_llama(folder / "model", max_position_embeddings=4096)),
        "quickstart/lora": str(folder / "lora"),
        "quickstart/merged": str(folder / "merged"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert run("train", "quickstart.yaml", places, *SMALL) == 0
        assert run("export", "export.yaml", places) == 0
    return places


def run(command: str, name: str, places: dict[str, str], *words: str) -> int:
    """The example with the paths replaced; `words` that a file of this kind does not know are left out."""
    moved = [f"{key}={places[value]}" for key, value in KEYS[name].items() if value in places]
    fitting = [word for word in words if not word.startswith(("eval_", "save_")) or word.split("=")[0] in KEYS[name]]
    return main([command, f"examples/{name}", *moved, *fitting])


@pytest.mark.parametrize("name", FILES)
def test_an_example_passes_the_check_as_it_is(name, capsys):
    assert main(["check", f"examples/{name}"]) == 0
    assert "fine" in capsys.readouterr().out


TRAINED = [name for name in FILES if KINDS[name] == "train"]
SOME = ("grpo.yaml", "pt.yaml", "sft_eval.yaml", "sft_predict.yaml")


@pytest.mark.parametrize("name", representatives(TRAINED, *SOME))
def test_a_training_example_runs_and_leaves_its_files(name, places, tmp_path, capsys):
    keys, output_dir = KEYS[name], tmp_path / "out"
    assert run("train", name, places, *SMALL, f"output_dir={output_dir}") == 0
    names = {path.name for path in output_dir.iterdir()}
    report = "data_report.json" if keys.get("do_train") else "eval_data_report.json"
    expected = {report, "all_results.json"}
    if keys.get("do_train"):
        weights = "adapter_model.safetensors" if keys["finetuning_type"] in ("lora", "oft") else "model.safetensors"
        expected |= {weights, "tokenizer.json", "README.md", "run.yaml", "trainer_log.jsonl", "train_results.json"}
        lines = [json.loads(line) for line in (output_dir / "trainer_log.jsonl").read_text().splitlines()]
        assert [line["current_steps"] for line in lines if "loss" in line] == [1, 2]
        assert main(["verify", str(output_dir)]) == 0
    if keys.get("plot_loss"):
        expected.add("training_loss.png")
    if keys.get("do_eval"):
        expected.add("eval_results.json")
    if keys.get("do_predict"):
        expected |= {"predict_results.json", "generated_predictions.jsonl"}
    assert expected <= names
    datasets = json.loads((output_dir / report).read_text())["datasets"]
    named = ",".join(filter(None, (keys.get("dataset"), keys.get("eval_dataset")))).split(",")
    assert set(datasets) == set(named)
    for account in datasets.values():
        assert account["kept"] == account["rows_in"] > 0, account["dropped"]


@pytest.mark.parametrize("name", [name for name in FILES if KINDS[name] == "infer"])
def test_a_chat_example_answers(name, places, capsys):
    assert run("chat", name, places, "max_new_tokens=8", "--once", "Who are you?") == 0
    assert capsys.readouterr().out.strip()


def test_the_export_example_answers_as_base_and_adapter_do(places, capsys):
    answers = []
    for name in ("chat_lora.yaml", "chat_merged.yaml"):
        capsys.readouterr()
        assert run("chat", name, places, "max_new_tokens=8", "--once", "Who are you?") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["verify", places["quickstart/merged"]]) == 0


@pytest.mark.parametrize("name", [name for name in FILES if KINDS[name] == "export"])
def test_an_export_example_writes_a_model(name, places, tmp_path):
    assert run("export", name, places, f"export_dir={tmp_path / 'merged'}") == 0
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "Modelfile", "manifest.json"} <= names


@pytest.mark.parametrize("name", [name for name in FILES if KINDS[name] == "eval"])
def test_an_evaluation_example_prints_its_table(name, places, capsys):
    assert run("eval", name, places, "max_samples=2") == 0
    assert "Average: " in capsys.readouterr().out


def test_every_dataset_of_the_examples_is_used_by_one():
    described = json.loads((ROOT / "examples" / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    used = {
        dataset
        for keys in KEYS.values()
        for key in ("dataset", "eval_dataset")
        for dataset in str(keys.get(key, "")).split(",")
    }
    assert set(described) == used - {""}


def test_the_preferences_are_those_of_their_rule():
    for name, rows in preference_data.files().items():
        assert json.loads((ROOT / "examples" / "data" / name).read_text(encoding="utf-8")) == rows


def test_the_length_of_an_answer_says_nothing_about_its_preference():
    for name in ("preferences.json", "preferences_eval.json"):
        pairs = preference_data.files()[name]
        assert sum(len(pair["rejected"]) > len(pair["chosen"]) for pair in pairs) * 2 == len(pairs)


def test_no_topic_to_evaluate_on_is_learned():
    files = preference_data.files()
    for kind in ("preferences", "feedback"):
        learned, held_out = ({row["instruction"] for row in files[f"{kind}{end}.json"]} for end in ("", "_eval"))
        assert not learned & held_out
