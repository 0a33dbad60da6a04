"""Run files are found, loaded and saved; those of LLaMA Board too."""

import pytest

from luthier.core.errors import InvalidInput, OutputError
from luthier.webui.document import values_of
from luthier.webui.run_files import load, run_files, save


def test_run_files_below_the_root_are_offered(tmp_path):
    for name in ("one.yaml", "sub/two.json", "sub/deeper/three.yml", "checkpoint-1/no.yaml", ".hidden/no.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"stage": "sft"}', "utf-8")
    (tmp_path / "other.yaml").write_text("a: 1", "utf-8")
    (tmp_path / "notes.txt").write_text("stage: sft", "utf-8")
    assert run_files(tmp_path) == ["one.yaml", "sub/two.json", "sub/deeper/three.yml"]


def test_a_run_file_is_loaded_as_it_is_and_json_as_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("# note\nstage: sft\n", "utf-8")
    assert load(tmp_path / "run.yaml") == "# note\nstage: sft\n"
    (tmp_path / "run.json").write_text('{"stage": "sft", "learning_rate": 1e-4}', "utf-8")
    assert values_of(load(tmp_path / "run.json")) == {"stage": "sft", "learning_rate": "0.0001"}


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    (tmp_path / "broken.json").write_text("{", "utf-8")
    for name, reason in (("latin.yaml", "not UTF-8"), ("broken.json", "not valid JSON"), ("absent.yaml", "No such")):
        with pytest.raises(InvalidInput, match=reason):
            load(tmp_path / name)


def test_a_llamaboard_config_becomes_a_run_file(tmp_path):
    (tmp_path / "2024.yaml").write_text(
        "top.model_name: Qwen3-4B\ntop.finetuning_type: lora\n"
        "top.quantization_bit: none\ntrain.training_stage: DPO\ntrain.dataset: [a, b]\n"
        "train.learning_rate: '5e-5'\ntrain.num_train_epochs: '3.0'\ntrain.compute_type: bf16\n"
        "train.use_dora: true\ntrain.report_to: []\ntrain.galore_rank: 16\ntrain.neftune_alpha: 0\n"
        "top.booster: flashattn2\n",
        "utf-8",
    )
    text = load(tmp_path / "2024.yaml")
    assert text.startswith("model_name_or_path:  # Qwen3-4B\n")
    assert values_of(text) == {
        "model_name_or_path": "",
        "do_train": "true",
        "finetuning_type": "lora",
        "stage": "dpo",
        "dataset": "a,b",
        "learning_rate": "5e-5",
        "num_train_epochs": "3.0",
        "bf16": "true",
        "use_dora": "true",
        "flash_attn": "fa2",
    }


def test_a_run_file_is_saved_under_a_new_name_in_the_root(tmp_path):
    assert save(tmp_path, " my-run ", "stage: sft\n").name == "my-run.yaml"
    assert (tmp_path / "my-run.yaml").read_text("utf-8") == "stage: sft\n"
    for name in ("my-run", "", "../up", "a/b", ".hidden"):
        with pytest.raises(OutputError):
            save(tmp_path, name, "")
