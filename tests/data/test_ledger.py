"""The account adds up for every stage and every option: no row and no token is lost without a word."""

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from luthier.config.load import load_train
from luthier.core.errors import ConfigError, RowError
from luthier.core.kinds import STAGES
from luthier.data import types
from luthier.data.chat.encoder import Encoder
from luthier.data.ledger import Ledger, ledger_of
from luthier.data.prepare import PreparedData, prepare
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.encoding import Encoding
from luthier.data.templates import get_template
from tests.tiny import byte_tokenizer

CUTOFF_LEN, NO_LIMIT = 60, 100_000
LENGTHS = [3, 90, 10, 41, 0, 7, 55, 20, 130, 15, 30, 5]
"""Letters of the answers; one is empty of sense and some are too long."""


def answer(length: int) -> str:
    return "a" * length or "?"


BROKEN = {"prompt": 7}
DATA: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "Dialogue": (
        {"columns": {"prompt": "prompt", "response": "answer"}},
        [{"prompt": f"q{n}", "answer": answer(length)} for n, length in enumerate(LENGTHS)],
    ),
    "Preference": (
        {"ranking": True, "columns": {"prompt": "prompt", "chosen": "good", "rejected": "bad"}},
        [{"prompt": f"q{n}", "good": answer(length), "bad": "no"} for n, length in enumerate(LENGTHS)],
    ),
    "Feedback": (
        {"columns": {"prompt": "prompt", "response": "answer", "kto_tag": "tag"}},
        [{"prompt": f"q{n}", "answer": answer(length), "tag": n % 2 == 0} for n, length in enumerate(LENGTHS)],
    ),
    "Prompt": (
        {"columns": {"prompt": "prompt"}},
        [{"prompt": f"q{n} {answer(length)}"} for n, length in enumerate(LENGTHS)],
    ),
}
"""Type of example -> description and rows that give it; every dataset gets one row more that cannot be used."""

OPTIONS = list(product(["truncate", "drop", "split"], [None, True], [False, True], [0, 4]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    for name, (_, rows) in DATA.items():
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [*rows[:5], BROKEN, *rows[5:]])))
    info = {name: {"file_name": f"{name}.jsonl", **description} for name, (description, _) in DATA.items()}
    (made / "dataset_info.json").write_text(json.dumps(info))
    return made


def loaded(stage: str, folder: Any, **keys: Any):
    """A run of the stage on data that it takes."""
    (kind, *_) = (example.__name__ for example in STAGES.get(stage).rows.examples)
    assert hasattr(types, kind) and kind in DATA, f"{kind}: write rows for this type of example above"
    base = {
        "model_name_or_path": "m",
        "dataset_dir": str(folder),
        "dataset": kind,
        "template": "chatml",
        "stage": stage,
    }
    base |= {"do_train": True, "output_dir": "o", **keys}
    try:
        load_train(base)
    except ConfigError as fault:  # a model that the stage asks for, and that rows do not depend on
        base |= {problem.key: "m" for problem in fault.problems if problem.reason.startswith("is missing")}
    try:
        return load_train(base)
    except ConfigError as fault:
        pytest.skip("the stage refuses it: " + "; ".join(f"{p.key} {p.reason}" for p in fault.problems))


def data_of(run) -> PreparedData:
    encoding = Encoding(Encoder(byte_tokenizer()), get_template("chatml"), run.data.cutoff_len)
    return prepare(run, STAGES.get(run.stage).rows, encoding)


def num_tokens(rows, parts) -> int:
    return sum(len(row[f"{part}input_ids"]) for row in rows for part in parts)


@pytest.mark.parametrize("stage", STAGES.names)
@pytest.mark.parametrize(("on_overlong", "packing", "streaming", "val_size"), OPTIONS)
def test_rows_and_tokens_add_up(folder, stage, on_overlong, packing, streaming, val_size, monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    keys = {"on_overlong": on_overlong, "cutoff_len": CUTOFF_LEN, "val_size": val_size, "packing": packing}
    run = loaded(stage, folder, **keys)
    # Also where a reference keeps the stage from streaming, which is no matter of rows.
    data = data_of(replace(run, data=replace(run.data, streaming=streaming, buffer_size=5)))
    ledger, rows = data.ledger, data.train
    if data.streamed is not None:
        rows, read = data.streamed.first(None)
        ledger.add(read)
    (account,) = ledger.accounts.values()
    assert account.rows_in == account.kept + account.num_dropped
    assert account.num_dropped >= 1 and (account.rows_in == len(LENGTHS) + 1 or (streaming and val_size))
    parts = STAGES.get(stage).rows.parts
    in_tables = num_tokens(rows, parts) + sum(num_tokens(table, parts) for table in data.eval.values())
    assert in_tables + ledger.leftover_tokens == account.tokens
    labels = [
        label
        for table in (rows, *data.eval.values())
        for row in table
        for part in parts
        for label in row[f"{part}labels"]
    ]
    if not packing and not ledger.leftover_tokens:
        assert sum(label >= 0 for label in labels) == account.labeled_tokens
    if on_overlong == "truncate" and STAGES.get(stage).rows.has_targets:  # prompts that wait for an answer are not cut
        whole = data_of(loaded(stage, folder, cutoff_len=NO_LIMIT, packing=False)).ledger
        (unlimited,) = whole.accounts.values()
        assert account.kept == unlimited.kept and unlimited.lost_tokens == 0
        assert account.tokens + account.lost_tokens == unlimited.tokens
        assert account.labeled_tokens + account.lost_labeled_tokens == unlimited.labeled_tokens
    assert ledger_of(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_accounts_are_added_and_taken():
    first, second = DatasetAccount(rows_in=3, kept=1, tokens=9), DatasetAccount(rows_in=25, kept=0)
    for number in range(2):
        first.drop(f"f, row {number}", RowError("bad"))
    for number in range(25):
        second.drop(f"g, row {number}", RowError("bad"))
    ledger = Ledger({"d": first}, {"train": 1}, 5)
    ledger.add(Ledger({"d": second, "e": DatasetAccount(rows_in=1, kept=1)}, {"train": 2, "eval": 1}, 6))
    taken = ledger.taken()
    assert (taken.accounts["d"].rows_in, taken.accounts["d"].num_dropped) == (28, 27)
    assert taken.accounts["d"].dropped_rows["bad"][:3] == ["f, row 0", "f, row 1", "g, row 0"]
    assert len(taken.accounts["d"].dropped_rows["bad"]) == 20
    assert (taken.samples, taken.leftover_tokens) == ({"train": 3, "eval": 1}, 11)
    assert ledger.rows_in == 0 and ledger.taken() == Ledger()


CALL = '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": %s}]}'
ONE_FAULT: dict[str, tuple[str, dict[str, Any]]] = {
    "no call": (CALL.replace("%s", '"not json {n}"'), {"formatting": "sharegpt"}),
    "no object of a call": (CALL.replace("%s", '"[{n}]"'), {"formatting": "sharegpt"}),
    "role": ('{"conversations": [{"from": "speaker {n}", "value": "q"}]}', {"formatting": "sharegpt"}),
    "end": (CALL.replace("function_call", "who {n}").replace("%s", '"a"'), {"formatting": "sharegpt"}),
    "tools": (
        '{"instruction": "q", "output": "a", "tools": "%s["}',
        {"columns": {"prompt": "instruction", "response": "output", "tools": "tools"}},
    ),
    "image": (
        '{"instruction": "q", "output": "a", "images": ["no/{n}.png"]}',
        {"columns": {"prompt": "instruction", "response": "output", "images": "images"}},
    ),
    "no row": ('"text {n}"', {}),
    "no JSON": ('{"instruction": %s"q" "output"}', {}),
    "key twice": ('{"key {n}": 1, "key {n}": 2}', {}),
}
"""A line of a file and its description; {n} is the number of the row, %s as many spaces."""


@pytest.mark.parametrize("fault", ONE_FAULT)
def test_many_rows_with_one_fault_are_one_line(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    line, description = ONE_FAULT[fault]
    lines = [line.replace("{n}", str(n)).replace("%s", " " * n) for n in range(40)]
    good = {"instruction": "q", "output": "a", "conversations": [{"from": "human", "value": "q"}]}
    good["conversations"].append({"from": "gpt", "value": "a"})
    (tmp_path / "d.jsonl").write_text("\n".join([*lines, json.dumps(good)]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.jsonl", **description}}))
    keys = {"model_name_or_path": "m", "dataset_dir": str(tmp_path), "dataset": "d", "template": "qwen"}
    data = data_of(load_train({**keys, "stage": "sft", "do_train": True, "output_dir": "o"}))
    (account,) = data.ledger.accounts.values()
    assert list(account.dropped.values()) == [40] and account.kept == 1
    (reason,) = data.ledger.reasons()
    assert "row 1" in reason and "row 3" in reason and "and 37 more" in reason


def test_reasons_beyond_the_tenth_are_one_line():
    account = DatasetAccount()
    for number in range(25):
        account.drop(f"f, row {number}", RowError(f"fault {number}"))
    lines = Ledger({"d": account}).reasons()
    assert len(lines) == 11 and lines[-1] == "d: 15 dropped for 15 other reasons"
