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
    (tmp_path / "run.json").write_text('{\n\t"run_name": "1e5",\n\t"seed": 1\n}', "utf-8")
    assert load(tmp_path / "run.json") == "run_name: '1e5'\nseed: 1\n"
    (tmp_path / "run.yaml").write_text("run_name: 2024-02-30\n", "utf-8")
    assert load(tmp_path / "run.yaml") == "run_name: 2024-02-30\n"


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    (tmp_path / "broken.json").write_text("{", "utf-8")
    for name, reason in (("latin.yaml", "not UTF-8"), ("broken.json", "not valid JSON"), ("absent.yaml", "No such")):
        with pytest.raises(InvalidInput, match=reason):
            load(tmp_path / name)


def test_a_llamaboard_config_becomes_a_run_file(tmp_path):
    for name, text in (("a.yaml", "top.model_name: m\n"), ("a.json", '{"top.model_name": "m"}')):
        (tmp_path / name).write_text(text, "utf-8")
        assert load(tmp_path / name) == "model_name_or_path:  # m\ndo_train: true\n"


def test_a_run_file_is_saved_under_a_new_name_in_the_root(tmp_path):
    assert save(tmp_path, " my-run ", "stage: sft\n").name == "my-run.yaml"
    assert (tmp_path / "my-run.yaml").read_text("utf-8") == "stage: sft\n"
    for name in ("my-run", "", "../up", "a/b", ".hidden", "a\0b", "a\nb", "a" * 300, "é" * 150):
        with pytest.raises(OutputError):
            save(tmp_path, name, "")
