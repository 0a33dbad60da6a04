"""`tokenized_path`: what is saved is read again, whatever the other keys say, and nothing else is taken for it."""

import json
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.core.errors import DataError
from luthier.core.kinds import STAGES
from luthier.data.prepare import PreparedData, prepare
from luthier.workflow.text import load_text_side

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(20)] + [{"instruction": "no answer"}]


@pytest.fixture
def values(tmp_path, llama_folder) -> dict[str, Any]:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    described = {name: {"file_name": "rows.json"} for name in ("rows", "other")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    keys = {"model_name_or_path": str(llama_folder), "dataset_dir": str(tmp_path), "dataset": "rows"}
    keys |= {"tokenized_path": str(tmp_path / "tokenized"), "output_dir": str(tmp_path / "out")}
    return {**keys, "template": "chatml", "do_train": True}


def prepared(values: dict[str, Any]) -> PreparedData:
    run = load_train(values)
    return prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"val_size": 5, "predict_with_generate": True},
        {"eval_dataset": "rows,other", "eval_on_each_dataset": True},
        {"packing": True, "cutoff_len": 100},
    ],
    ids=str,
)
def test_what_is_saved_is_read_again_without_the_datasets(values, tmp_path, said, keys):
    first = prepared({**values, **keys})
    assert any("tokenized rows saved" in line for line in said)
    (tmp_path / "rows.json").unlink()
    second = prepared({**values, "cutoff_len": 7, "on_overlong": "error"})
    assert [line for line in said if "using the tokenized rows" in line and str(tmp_path) in line]
    assert second.fingerprint == first.fingerprint and second.is_packed == first.is_packed
    assert {n: r["input_ids"] for n, r in second.prompts.items()} == {
        n: r["input_ids"] for n, r in first.prompts.items()
    }
    assert second.eval.keys() == first.eval.keys()
    assert second.ledger.accounts == first.ledger.accounts


def test_the_sets_are_those_of_a_dataset_dict(values, tmp_path):
    import datasets

    prepared({**values, "val_size": 5})
    loaded = datasets.load_from_disk(str(tmp_path / "tokenized"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 15, "validation": 5}


def test_no_dataset_needs_to_be_named(values):
    first = prepared({**values, "val_size": 5})
    del values["dataset"]
    assert prepared({**values, "do_eval": True, "eval_strategy": "epoch"}).fingerprint == first.fingerprint


def test_a_folder_of_something_else_is_not_written_over(values, tmp_path):
    (tmp_path / "tokenized").mkdir()
    (tmp_path / "tokenized" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"tokenized_path.*holds no tokenized rows"):
        prepared(values)
    assert [path.name for path in (tmp_path / "tokenized").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"input_ids": [[1, 2]]}, "no column labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]], "position_ids": [[0, 1]]}, "packed by another program"),
    ],
)
def test_rows_that_cannot_be_trained_on(values, tmp_path, columns, reason):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(str(tmp_path / "tokenized"))
    with pytest.raises(DataError, match=reason):
        prepared(values)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"datasets": {"rows": {"stars": 5}}, "samples": {}}'])
def test_a_damaged_report_is_named(values, tmp_path, text):
    """It comes from another version, or a copy was cut off."""
    prepared(values)
    (tmp_path / "tokenized" / "data_report.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenized_path: .*data_report\.json: is damaged, or of another version"):
        prepared(values)
