"""Rows in `tokenized_path` are used with the stage, tokenizer and chat format that made them, and with no others."""

import json
import shutil
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.core.errors import DataError
from luthier.core.kinds import STAGES
from luthier.data.cache.provenance import MADE_BY_FILE
from luthier.data.prepare import PreparedData, prepare
from luthier.workflow.text import load_text_side
from tests.chat_programs import tokenizer_with
from tests.tiny import byte_tokenizer

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(5)]
PAIRS = [{"instruction": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(5)]


@pytest.fixture
def values(tmp_path, llama_folder) -> dict[str, Any]:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    ranked = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    described = {
        "rows": {"file_name": "rows.json"},
        "again": {"file_name": "rows.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": ranked},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    keys = {"model_name_or_path": str(llama_folder), "dataset_dir": str(tmp_path), "dataset": "rows"}
    keys |= {"tokenized_path": str(tmp_path / "tokenized"), "output_dir": str(tmp_path / "out")}
    return {**keys, "template": "chatml", "do_train": True, "stage": "sft"}


def prepared(values: dict[str, Any], tokenizer: Any = None, folder: Any = None) -> PreparedData:
    """`tokenizer`: of a model that is a copy of the run's, in `folder`."""
    if tokenizer is not None:
        shutil.copytree(values["model_name_or_path"], folder)
        tokenizer.save_pretrained(folder)
        values = {**values, "model_name_or_path": str(folder)}
    run = load_train(values)
    plan = STAGES.get(run.stage).rows
    return prepare(run, plan, load_text_side(run, reads_chat=plan.reads_chat).encoding)


def shuffled(tokenizer: Any) -> Any:
    """The same tokens under other ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **roles)


def normalizing(tokenizer: Any) -> Any:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def larger(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["<more>"])
    return tokenizer


@pytest.mark.parametrize("change", [shuffled, normalizing, larger], ids=lambda change: change.__name__)
def test_another_tokenizer(values, tmp_path, change):
    prepared(values)
    with pytest.raises(DataError, match=r"tokenizer: .*llama.* there, .*other.* here") as refusal:
        prepared(values, change(byte_tokenizer()), tmp_path / "other")
    assert "tokenized_path" in str(refusal.value) and "-> name a new folder" in str(refusal.value)


OTHER = [
    ({"template": "qwen"}, "template: chatml there, qwen here"),
    ({"template": "auto"}, "template: chatml there, auto here"),
    ({"default_system": "Be brief."}, 'default_system: "" there, Be brief. here'),
    ({"tool_format": "qwen"}, "tool_format: default there, qwen here"),
    ({"train_on_prompt": True}, "train_on_prompt: false there, true here"),
    ({"mask_history": True}, "mask_history: false there, true here"),
    ({"stage": "pt"}, "stage: sft there, pt here"),
    ({"stage": "dpo", "dataset": "pairs"}, "stage: sft there, dpo here"),
    ({"stage": "kto"}, "stage: sft there, kto here"),
]


@pytest.mark.parametrize(("keys", "difference"), OTHER, ids=str)
def test_another_chat_format_or_stage(values, keys, difference):
    prepared(values)
    with pytest.raises(DataError) as refusal:
        prepared({**values, **keys})
    assert difference in str(refusal.value)


def test_another_text_of_the_models_own_chat_template(values, tmp_path):
    values = {**values, "template": "auto"}
    prepared({**values}, tokenizer_with("chatml"), tmp_path / "first")
    with pytest.raises(DataError, match=r"text of the chat template: [0-9a-f]{12} there, [0-9a-f]{12} here"):
        prepared(values, tokenizer_with("open end"), tmp_path / "second")


def test_a_thinking_format_minds_how_it_thinks(values):
    prepared({**values, "template": "qwen3"})
    with pytest.raises(DataError, match="enable_thinking: true there, false here"):
        prepared({**values, "template": "qwen3", "enable_thinking": False})
    assert prepared({**values, "template": "qwen3"}).train is not None


def test_a_format_that_does_not_think_does_not(values):
    prepared(values)
    assert prepared({**values, "enable_thinking": False}).train is not None


def test_stages_with_the_same_rows_share_a_folder(values):
    values["dataset"] = "pairs"
    first = prepared({**values, "stage": "rm"})
    assert prepared({**values, "stage": "dpo"}).fingerprint == first.fingerprint


def test_the_rows_stay_when_the_model_is_elsewhere(values, tmp_path):
    first = prepared(values)
    shutil.copytree(values["model_name_or_path"], tmp_path / "moved")
    assert prepared({**values, "model_name_or_path": str(tmp_path / "moved")}).fingerprint == first.fingerprint


def test_another_version_of_the_tokenizers_library_compares_the_vocabulary(values, tmp_path):
    """Its serialization may change from version to version, while the ids do not."""
    prepared(values)
    path = tmp_path / "tokenized" / MADE_BY_FILE
    record = json.loads(path.read_text())
    record["tokenizer"] |= {"library": "0.1", "digest": "other"}
    path.write_text(json.dumps(record))
    assert prepared(values).train is not None
    with pytest.raises(DataError, match="tokenizer: "):
        prepared(values, shuffled(byte_tokenizer()), tmp_path / "other")


def stale(said: list[str]) -> list[str]:
    return [line for line in said if "stay as they were made" in line]


KEPT = [
    ({"cutoff_len": 7}, "cutoff_len: 2048 there, 7 here"),
    ({"dataset": "again"}, "dataset: rows there, again here"),
    ({"max_samples": 2}, "max_samples: null there, 2 here"),
    ({"packing": True}, "packing: null there, true here"),
]


@pytest.mark.parametrize(("keys", "difference"), KEPT, ids=str)
def test_other_data_keys_are_a_warning(values, said, keys, difference):
    first = prepared(values)
    assert prepared({**values, **keys}).fingerprint == first.fingerprint
    (line,) = stale(said)
    assert difference in line


def test_changed_data_are_a_warning(values, tmp_path, said):
    prepared(values)
    prepared(values)
    assert not stale(said)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:-1]))
    prepared(values)
    (line,) = stale(said)
    assert "the files of dataset 'rows' have changed since" in line


def test_nothing_is_asked_of_data_that_are_not_here(values, tmp_path, said):
    prepared(values)
    (tmp_path / "rows.json").unlink()
    (tmp_path / "dataset_info.json").unlink()
    assert prepared(values).train is not None and not stale(said)


def unrecorded(values: dict[str, Any], tmp_path: Any, largest: int) -> None:
    import datasets

    rows = {"input_ids": [[1, 2], [3, largest]], "labels": [[1, 2], [-100, largest]]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "tokenized"))


def test_a_folder_without_a_record_is_checked_for_ids_beyond_the_vocabulary(values, tmp_path):
    size = len(byte_tokenizer())
    unrecorded(values, tmp_path, size)
    with pytest.raises(DataError, match=rf"tokenized_path.* token id {size},.* has {size} tokens"):
        prepared(values)


def test_a_folder_without_a_record_says_so(values, tmp_path, said):
    unrecorded(values, tmp_path, len(byte_tokenizer()) - 1)
    data = prepared(values)
    assert data.train is not None and data.train["input_ids"][1] == [3, len(byte_tokenizer()) - 1]
    assert any("does not say which tokenizer" in line for line in said)


@pytest.mark.parametrize("content", ["{", "{}", '{"stage": "sft", "rows": 1}', "[]"])
def test_a_damaged_record(values, tmp_path, content):
    prepared(values)
    (tmp_path / "tokenized" / MADE_BY_FILE).write_text(content)
    with pytest.raises(DataError, match=r"made_by\.json: is damaged"):
        prepared(values)
