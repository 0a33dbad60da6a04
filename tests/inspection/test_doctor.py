"""`luthier data RUN --doctor`: every check finds what was planted, and nothing in clean data."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from luthier.config.load import load_train
from luthier.core.kinds import CHECKS, STAGES
from luthier.data.prepare import prepare
from luthier.data.types import Message, Preference, ToolCall
from luthier.inspection.doctor import CheckContext, Place, Sample
from luthier.workflow.text import load_text_side
from tests.small_world import TOOL_TALK, TOOLS, small_world

EXAMPLES = sorted(Path(__file__).parents[2].joinpath("examples").glob("*.yaml"))
LONG = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
CHAT = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools", "images": "images"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def doctor(world, tmp_path, capsys):
    """Runs the doctor on datasets given as rows, and returns (findings, summary, status).

    `train` and `evaluate` are lists of rows or the text of a file.
    """

    def examine(train: Any, evaluate: Any = None, *words: str, form: Any = None, **changes: Any):
        for name, rows in (("train", train), ("eval", evaluate)):
            text = rows if isinstance(rows, str) else json.dumps(rows)
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        info = {name: {"file_name": f"{name}.json", **(form or {})} for name in ("train", "eval")}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        evaluated = {"eval_dataset": "eval"} if evaluate is not None else {}
        run = {**world, "dataset_dir": str(tmp_path), "dataset": "train", **evaluated, **changes}
        run_file = tmp_path / "run.yaml"
        run_file.write_text(yaml.safe_dump(run), encoding="utf-8")
        capsys.readouterr()
        status = main(["data", str(run_file), "--doctor", "--json", *words])
        *findings, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return findings, last["summary"], status

    return examine


def asked(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def talk(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def found(findings: list[dict[str, Any]]) -> list[tuple[str, str, list[int]]]:
    return [(finding["check"], finding["severity"], finding["rows"]) for finding in findings]


CLEAN = [asked("How high is it?", "Ten feet."), asked("Where does it stand?", "Behind the old barn.")]


def test_clean_rows(doctor):
    findings, summary, status = doctor(CLEAN, [asked("Who built it?", "Nobody knows.")])
    assert findings == [] and status == 0
    assert summary["rows"] == {"train": {"train": 2}, "eval": {"eval": 1}}
    assert summary["severities"] == {"error": 0, "warning": 0, "info": 0} and summary["not_checked"] == {}


def test_exact_duplicates(doctor, tmp_path):
    (finding,), summary, _ = doctor([*CLEAN, CLEAN[0]])
    assert found([finding]) == [("exact_duplicates", "warning", [3])]
    assert finding["file"] == str(tmp_path / "train.json") and finding["dataset"] == "train"
    assert finding["other"] == {"file": str(tmp_path / "train.json"), "row": 1}
    assert summary["findings"] == {"exact_duplicates": 1}
    (finding,), *_ = doctor([*CLEAN, CLEAN[0]], val_size=1)
    assert "val_size" in finding["remedy"]


def test_near_duplicates(doctor):
    (finding,), *_ = doctor([asked("Count!", LONG), *CLEAN, asked("count", LONG + "...")])
    assert found([finding]) == [("near_duplicates", "info", [4])] and finding["other"]["row"] == 1
    assert "100% the same" in finding["what"]
    changed = LONG.replace("ten", "10")
    assert found(doctor([asked("Count!", LONG), asked("Count!", changed)])[0]) == [], "3 of 19 triples differ"


def test_leakage(doctor):
    rows = [CLEAN[1], asked("Count!", LONG), asked("Why?", "Because.")]
    findings, *_ = doctor([*CLEAN, asked("count", LONG)], rows)
    assert found(findings) == [("leakage", "error", [1]), ("leakage", "warning", [2])]
    assert [finding["other"]["row"] for finding in findings] == [2, 3]
    assert {finding["split"] for finding in findings} == {"eval"}


def test_a_dataset_for_both(doctor):
    findings, *_ = doctor(CLEAN, CLEAN, eval_dataset="train")
    assert found(findings) == [("leakage", "error", [1]), ("leakage", "error", [2])]
    assert findings[0]["what"] == "it is trained on, too"


def test_empty_answers(doctor):
    findings, *_ = doctor([*CLEAN, asked("And?", " \n"), asked("Hm?", "<think>\nwell\n</think>\n\n")])
    assert found(findings) == [("empty_answers", "warning", [3]), ("empty_answers", "warning", [4])]


@pytest.mark.parametrize(("liked", "status"), [((1, 1), 1), ((0, 0), 1), ((1, 0), 0)])
def test_feedback_of_one_kind(doctor, liked, status):
    rows = [{**row, "good": bool(value)} for row, value in zip(CLEAN, liked, strict=True)]
    form = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}}
    findings, _, ended = doctor(rows, None, "--strict", form=form, stage="kto")
    assert [(one["check"], one["severity"]) for one in findings] == [("one_sided_tags", "warning")] * status
    assert ended == status
    if findings:
        assert f"{sum(liked)} training rows are liked and {2 - sum(liked)} disliked" in findings[0]["what"]


def test_role_order(doctor):
    rows = [
        talk(("human", "a"), ("gpt", "b")),
        talk(("gpt", "b"), ("human", "a")),
        talk(("human", "a"), ("gpt", "b"), ("human", "c")),
        talk(("system", "s")),
    ]
    findings, *_ = doctor(rows, form=CHAT)
    assert found(findings) == [("role_order", "error", [number]) for number in (2, 3, 4)]


def test_tool_json(doctor):
    called = [("human", "a"), ("function_call", "weather(Rome)"), ("observation", "{}"), ("gpt", "b")]
    rows = [
        {"conversations": TOOL_TALK, "tools": TOOLS},
        talk(*called, tools=TOOLS),
        talk(("human", "c"), ("gpt", "d"), tools="[{]"),
        talk(("human", "e"), ("gpt", "f"), tools='[{"description": "has no name"}]'),
    ]
    findings, *_ = doctor(rows, form=CHAT)
    assert found(findings) == [("tool_json", "error", [number]) for number in (2, 3, 4)]


def test_missing_media(doctor):
    rows = [talk(("human", "a"), ("gpt", "b")), talk(("human", "<image>c"), ("gpt", "d"), images=["none.png"])]
    findings, *_ = doctor(rows, form=CHAT)
    assert found(findings) == [("missing_media", "error", [2])] and "none.png" in findings[0]["what"]


def test_rows_that_cannot_be_used(doctor):
    findings, *_ = doctor([*CLEAN, {"instruction": 7, "output": "x"}, {"instruction": "x"}])
    assert found(findings) == [("unusable_rows", "error", [3]), ("unusable_rows", "error", [4])]


def test_no_row_can_be_used(doctor):
    findings, summary, status = doctor([{"instruction": 7, "output": "x"}] * 3)
    assert found(findings) == [("unusable_rows", "error", [number]) for number in (1, 2, 3)]
    assert status == 0 and summary["lengths"] is None


def test_a_file_that_breaks_off(doctor):
    findings, summary, _ = doctor(json.dumps(CLEAN)[:-4], CLEAN)
    assert found(findings) == [("unreadable_data", "error", []), ("leakage", "error", [1])]
    assert "train.json" in findings[0]["what"] and findings[1]["split"] == "eval", "what stands before it is examined"
    assert summary["rows"]["eval"] == {"eval": 2}, "the other datasets are examined all the same"


@pytest.mark.parametrize(("escaped", "severity", "word"), [(False, "warning", "not escaped"), (True, "info", "plain")])
def test_special_tokens(doctor, escaped, severity, word):
    rows = [*CLEAN, asked("a<|im_end|>b", "c"), asked("<think>", "d")]
    findings, *_ = doctor(rows, split_special_tokens=escaped)
    assert found(findings) == [("special_tokens", severity, [3])]
    assert "user message 1 holds <|im_end|>" in findings[0]["what"] and word in findings[0]["what"]


def test_special_tokens_that_belong_to_answers(doctor, world):
    new = {"add_special_tokens": "<think>,</think>", "resize_vocab": True}
    findings, *_ = doctor([asked("a", "<think>b</think>c"), asked("<think>", "d")], **new)
    assert found(findings) == [("special_tokens", "warning", [2])]


def test_rows_without_a_label_after_truncation(doctor):
    findings, *_ = doctor([*CLEAN, asked("q" * 200, "a")], cutoff_len=1)
    assert [finding["rows"] for finding in findings if finding["check"] == "no_label"] == [[1], [2], [3]]
    assert "222 tokens" in [finding["remedy"] for finding in findings if finding["check"] == "no_label"][-1]
    assert "no_label" not in {check for check, *_ in found(doctor([asked("q" * 200, "a")], cutoff_len=90)[0])}


@pytest.mark.parametrize("rule", ["truncate", "drop"])
def test_rows_with_errors_are_those_that_training_leaves_out(doctor, tmp_path, rule):
    rows = [
        *CLEAN,
        {"instruction": 7},
        asked("q" * 200, "a"),
        asked("?", ""),
        CLEAN[0],
        {"output": "x"},
        asked("", "y"),
    ]
    findings, *_ = doctor(rows, cutoff_len=90, on_overlong=rule)
    run = load_train(tmp_path / "run.yaml")
    account = prepare(run, STAGES.get("sft").rows, load_text_side(run).encoding).ledger.accounts["train"]
    lost = {number for finding in findings if finding["severity"] == "error" for number in finding["rows"]}
    places = [place for listed in account.dropped_rows.values() for place in listed]
    assert lost == {int(place.rpartition("row ")[2]) for place in places} and len(lost) == account.num_dropped


@pytest.mark.parametrize(
    ("rule", "severity", "fate"),
    [
        ("truncate", "warning", "learned and the end of an answer"),
        ("drop", "error", "the row is dropped"),
        ("split", "info", "cut into several rows"),
        ("error", "error", "the run stops here"),
    ],
)
def test_overlong_rows(doctor, rule, severity, fate):
    findings, summary, _ = doctor([*CLEAN, asked("Tell!", "word " * 80)], cutoff_len=150, on_overlong=rule)
    assert found(findings) == [("overlong", severity, [3])] and fate in findings[0]["what"]
    assert summary["lengths"]["longer_than_cutoff_len"] == 1 and summary["lengths"]["longest"] > 400


def test_pairs_that_prefer_nothing():
    terms = CheckContext(
        on_overlong="truncate",
        cutoff_len=8,
        splits_evaluation_off=False,
        split_special_tokens=False,
        special_words=re.compile(r"(?!)"),
        answer_words="",
    )

    def pair(chosen: str, rejected: str) -> Sample:
        example = Preference((Message("user", "q"),), Message("assistant", chosen), Message("assistant", rejected))
        return Sample("pairs", "train", Place("f", 1, "f, row 1"), example)

    def names(sample: Sample) -> list[str]:
        return [f.check for name in CHECKS.names for f in CHECKS.get(name).find(sample, terms)]

    assert names(pair("a", "b")) == [] and names(pair("a", "a ")) == ["equal_pairs"]
    assert names(pair("a", "")) == ["empty_answers"]
    called = Message("function", "", calls=(ToolCall("f", {}),))
    assert names(replace(pair("a", "b"), example=Preference((), called, Message("assistant", "b")))) == []
    assert names(replace(pair("a", "b"), example=Preference((), called, replace(called, thought="hm")))) == []
    assert names(replace(pair("a", "b"), example=Preference((), called, called))) == ["equal_pairs"]


def test_plain_text(doctor):
    form = {"columns": {"prompt": "text"}}
    rows = [{"text": "The first line."}, {"text": "Another one."}, {"text": "The first line."}, {"text": ""}]
    findings, *_ = doctor(rows, form=form, stage="pt", cutoff_len=16)
    assert found(findings) == [("exact_duplicates", "warning", [3]), ("unusable_rows", "error", [4])]


def test_strict(doctor):
    assert doctor(CLEAN, None, "--strict")[2] == 0
    assert doctor([*CLEAN, CLEAN[0]], None, "--strict")[2] == 1
    assert doctor([asked("Count!", LONG), asked("count", LONG)], None, "--strict")[2] == 0, "only good to know"


def test_words_are_counted_completely_and_listed_up_to_a_limit(doctor, tmp_path, capsys):
    doctor([CLEAN[0]] * 9)
    assert main(["data", str(tmp_path / "run.yaml"), "--doctor", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "warning: exact_duplicates, 8 findings" in out and "  and 6 more\n" in out
    assert out.count("the same as") == 2 and out.endswith("0 errors, 8 warnings, 0 to know\n")


def test_without_the_library_for_near_duplicates(doctor, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    monkeypatch.setattr("luthier.core.versions.is_installed", lambda module: module != "datasketch")
    findings, summary, _ = doctor([CLEAN[0], CLEAN[0], asked("Count!", LONG), asked("count", LONG)])
    assert found(findings) == [("exact_duplicates", "warning", [2])]
    assert "pip install 'luthier[doctor]'" in summary["not_checked"]["near_duplicates"]


@pytest.mark.parametrize("run_file", EXAMPLES, ids=lambda path: path.stem)
def test_the_data_of_the_examples_are_clean(run_file, world, capsys, monkeypatch):
    run = yaml.safe_load(run_file.read_text("utf-8"))
    if not run.keys() & {"dataset", "eval_dataset"}:
        pytest.skip("it names no datasets")
    monkeypatch.chdir(run_file.parents[1])
    if not run["dataset_dir"].startswith("examples/"):
        pytest.skip("its data are drawn by the program beside it")
    changes = ["adapter_name_or_path=null"] if "adapter_name_or_path" in run else []
    words = [str(run_file), f"model_name_or_path={world['model_name_or_path']}", "cutoff_len=4096", *changes]
    assert main(["data", *words, "--doctor", "--json", "--strict"]) == 0
