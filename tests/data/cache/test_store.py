"""Rows are tokenized once per content: the same input is found again, a changed one never is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.core.errors import InvalidInput
from luthier.core.kinds import STAGES, TOOL_SYNTAXES
from luthier.data.cache import fingerprint, store
from luthier.data.cache.fingerprint import file_digest
from luthier.data.cache.store import Cache
from luthier.data.prepare import PreparedData, prepare
from luthier.data.rows.maker import RowMaker
from luthier.data.sources.readers import DataFile
from luthier.workflow.text import load_text_side

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(20)] + [{"instruction": "no answer"}]


@pytest.fixture
def values(tmp_path, llama_folder, monkeypatch) -> dict[str, Any]:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    keys = {"model_name_or_path": str(llama_folder), "dataset_dir": str(tmp_path), "dataset": "rows"}
    return {**keys, "template": "chatml", "output_dir": str(tmp_path / "out")}


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The datasets that have been tokenized."""
    names: list[str] = []
    rows = RowMaker.rows

    def counted(self, source, spec, account):
        names.append(spec.name)
        return rows(self, source, spec, account)

    monkeypatch.setattr(RowMaker, "rows", counted)
    return names


def prepared(values: dict[str, Any]) -> PreparedData:
    run = load_train(values)
    return prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)


def test_a_second_start_has_the_same_rows_and_the_same_report(values, made):
    keys = {**values, "val_size": 3, "predict_with_generate": True}
    first, second = prepared(keys), prepared(keys)
    assert made == ["rows"]
    assert second.fingerprint == first.fingerprint
    assert second.ledger.to_json() == first.ledger.to_json() and first.ledger.accounts["rows"].num_dropped == 1
    assert second.prompts[""]["input_ids"] == first.prompts[""]["input_ids"]


def test_overwrite_cache_makes_them_anew(values, made):
    assert prepared(values).fingerprint == prepared({**values, "overwrite_cache": True}).fingerprint
    assert made == ["rows", "rows"]


CHANGES = [
    {"cutoff_len": 30},
    {"template": "qwen"},
    {"default_system": "Be brief."},
    {"train_on_prompt": True},
    {"mask_history": True},
    {"on_overlong": "drop"},
    {"max_samples": 3},
    {"split_special_tokens": True},
    {"add_special_tokens": "<new>", "resize_vocab": True},
    {"enable_thinking": False},
    {"tool_format": "llama3"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_changed_key_never_takes_the_rows_of_another(values, made, change):
    prepared(values)
    prepared({**values, **change})
    assert made == ["rows", "rows"]


PROBABILITIES = {"dataset": "rows,plain", "mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5"}
ORDERS = [
    {},
    {"dataset": "more,rows"},
    {"dataset": "rows"},
    {"max_samples": 4},
    {"seed": 7},  # of the random sample of `more`
    {"val_size": 2},
    {"val_size": 3},
    {"val_size": 2, "seed": 7},
    {"mix_strategy": "interleave_once"},
    {"mix_strategy": "interleave_over"},
    PROBABILITIES,
    {**PROBABILITIES, "seed": 7},
    {**PROBABILITIES, "interleave_probs": "0.2,0.8"},
    {"cutoff_len": 101},
    {"packing": False},
]


def test_packs_are_never_those_of_rows_in_another_order(values, tmp_path):
    """Whatever the cache holds, the rows are those that are made without one."""
    more = [{"instruction": f"another {number}", "output": "?"} for number in range(9)]
    (tmp_path / "more.json").write_text(json.dumps(more))
    described = {"rows": {"file_name": "rows.json"}, "plain": {"file_name": "more.json"}}
    described["more"] = {"file_name": "more.json", "num_samples": 6}
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    every = [{**values, "dataset": "rows,more", "packing": True, "cutoff_len": 200, **order} for order in ORDERS]
    found = [prepared(keys).fingerprint for keys in every]
    assert len(set(found)) == len(ORDERS)
    assert found == [prepared({**keys, "overwrite_cache": True}).fingerprint for keys in every]


def test_keys_that_say_how_to_work_do_not_matter(values, made):
    prepared(values)
    prepared({**values, "preprocessing_batch_size": 3, "preprocessing_num_workers": 4, "learning_rate": 1e-3})
    assert made == ["rows"]


def test_a_changed_file_is_read_even_if_its_size_and_time_stay(values, made, tmp_path):
    path = tmp_path / "rows.json"
    before = prepared(values)
    state = path.stat()
    path.write_text(path.read_text().replace("question 7", "question X"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = prepared(values)
    assert made == ["rows", "rows"] and before.fingerprint != after.fingerprint


def test_a_changed_description_or_tokenizer_never_takes_the_rows_of_another(values, made, tmp_path):
    from tests.tiny import SPECIAL_TOKENS, byte_tokenizer, tiny_llama

    prepared(values)
    described = {"rows": {"file_name": "rows.json", "columns": {"prompt": "output", "response": "instruction"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    prepared(values)
    folder = tiny_llama(tmp_path / "other", tokenizer=byte_tokenizer(bos_token=SPECIAL_TOKENS[1]))
    prepared({**values, "model_name_or_path": str(folder)})
    assert made == ["rows"] * 3


def test_tools_described_with_the_date_are_described_anew_the_next_day(values, made, monkeypatch):
    dated = [name for name in TOOL_SYNTAXES.names if fingerprint._has_date(name)]
    assert dated and "default" not in dated
    keys = {**values, "tool_format": dated[0]}
    prepared(keys)

    class Tomorrow(fingerprint.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 1)

    monkeypatch.setattr(fingerprint, "date", Tomorrow)
    prepared(values)
    prepared(keys)
    assert made == ["rows"] * 3


def test_the_hash_of_a_big_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "BIG_FILE_BYTES", 1)
    monkeypatch.setattr(fingerprint, "SETTLED_NANOSECONDS", 0)
    path, hashed = tmp_path / "a.json", []
    path.write_text("old")
    time.sleep(0.02)
    own = fingerprint._hashed
    monkeypatch.setattr(fingerprint, "_hashed", lambda file: hashed.append(1) or own(file))
    file = DataFile(str(path), "json", lambda: path.open("rb"))
    first = file_digest(file, tmp_path / "memo")
    assert file_digest(file, tmp_path / "memo") == first and len(hashed) == 1
    state = path.stat()
    path.write_text("new")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file_digest(file, tmp_path / "memo") != first and len(hashed) == 2


def test_what_fails_leaves_nothing(tmp_path):
    cache = Cache(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        cache.entry("key", fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert (cache.entry("key", lambda folder: None)).is_dir()


WAITING = """
import sys, time
from pathlib import Path
from luthier.data.cache.store import Cache
folder, makes = Path(sys.argv[1]), sys.argv[2] == "first"
def make(entry):
    print("made", flush=True)
    time.sleep(1)
    (entry / "rows").write_text("whole")
if makes:
    time.sleep(0.5)
print((Cache(folder, makes).entry("key", make) / "rows").read_text())
"""


def test_of_several_processes_one_makes_an_entry_and_the_others_wait(tmp_path):
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    others = [subprocess.Popen([*command, "other"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first = subprocess.Popen([*command, "first"], stdout=subprocess.PIPE, text=True)
    assert first.communicate(timeout=300)[0].split() == ["made", "whole"]
    assert [other.communicate(timeout=300)[0].split() for other in others] == [["whole"], ["whole"]]


def test_a_machine_that_sees_no_other_one_makes_its_own_rows(tmp_path, monkeypatch, said):
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.2)
    entry = Cache(tmp_path, makes=False).entry("key", lambda folder: (folder / "rows").write_text("own") and None)
    assert (entry / "rows").read_text() == "own"
    assert f"waiting for the first process of the run to make the rows in {tmp_path / 'key'}" in said[0]
    assert "so this machine makes its own -> set data_shared_file_system: false" in said[1]
    assert len(said) == 2


def test_a_killed_process_leaves_nothing_that_is_taken_for_rows(tmp_path):
    command = [sys.executable, "-c", WAITING.replace("time.sleep(1)", "time.sleep(60)"), str(tmp_path), "first"]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None and killed.stdout.readline() == "made\n"
    killed.kill()
    killed.wait()
    killed.stdout.close()
    again = subprocess.run([sys.executable, "-c", WAITING, str(tmp_path), "first"], capture_output=True, text=True)
    assert again.stdout.split() == ["made", "whole"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("text", ["much", "-1", "inf", "nan"])
def test_a_size_that_is_no_number(values, monkeypatch, text):
    monkeypatch.setenv("LUTHIER_CACHE_GB", text)
    with pytest.raises(InvalidInput, match=r"LUTHIER_CACHE_GB: .* is not a number of gigabytes"):
        prepared(values)
