"""Answers to the run's own rows, compared with what a chat with the same model says."""

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.core.errors import ConfigError, DataError
from tests.tiny import tiny_llama

QUESTIONS = ["one", "two things", "three or more", "4", "five?", "six", "seven", "eight"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """Rows whose answers are what the model says, but for the first two."""
    root = tmp_path_factory.mktemp("generation")
    model = speaks_ascii(tiny_llama(root / "model"))
    keys = {"model_name_or_path": str(model), "template": "chatml", "do_sample": False, "max_new_tokens": 6}
    chat = luthier.chat(keys)
    rows = []
    for question in QUESTIONS:
        rows.append({"instruction": question, "output": chat.ask(question)})
        chat.clear()
    for row in rows[:2]:
        row["output"] = "something else"
    write(root, "said", rows)
    write(root, "classes", [{**row, "output": "yes" if number % 2 else "no"} for number, row in enumerate(rows)])
    info = {name: {"file_name": f"{name}.json"} for name in ("said", "classes")}
    (root / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {**keys, "dataset_dir": str(root), "eval_dataset": "said", "task": "generation", "batch_size": 2}


def speaks_ascii(folder: Path) -> Path:
    """The model says whole characters only: the logits of other bytes are 0, below the best of the rest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    parts = [number for number in range(len(tokenizer)) if not tokenizer.decode([number]).isascii()]
    model.lm_head.weight.data[parts] = 0
    model.save_pretrained(folder)
    return folder


def write(root: Path, name: str, rows: list[dict[str, str]]) -> None:
    (root / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def test_answers_are_those_of_a_chat(world, tmp_path):
    """Six of eight references are the model's own words."""
    folder = tmp_path / "results"
    found = luthier.evaluate({**world, "save_dir": str(folder), "metrics": ["exact", "f1"]})
    assert found.summary["n"] == 8
    assert found.summary["exact"] == 6 / 8
    assert found.summary["standard_error"]["exact"] == pytest.approx((6 / 8 * 2 / 8 / 7) ** 0.5)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["scores"]["exact"] for line in lines] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["index"] for line in lines] == list(range(8))
    assert "three or more" in lines[2]["prompt"]
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))[""]["3"] == lines[3]["answer"]
    assert "exact" in (folder / "results.log").read_text(encoding="utf-8")


def test_the_batch_size_changes_nothing(world):
    alone, together = (luthier.evaluate({**world, "batch_size": size}) for size in (1, 8))
    answers = [[record.values["answer"] for record in one.tasks["generation"].records] for one in (alone, together)]
    assert answers[0] == answers[1]


def test_classes_are_reported_one_by_one(world):
    found = luthier.evaluate({**world, "eval_dataset": "classes", "metrics": ["accuracy", "recall"]})
    assert set(found.summary["classes"]) == {"yes", "no"}
    assert found.summary["classes"]["no"]["n"] == 4
    assert list(found.tasks["generation"].task.measures(found.tasks["generation"].records)) == ["accuracy", "recall"]


def test_held_out_rows_are_those_of_training(world):
    """val_size sets two rows of the dataset aside, and only these are asked."""
    found = luthier.evaluate({**world, "eval_dataset": None, "dataset": "said", "val_size": 2})
    assert found.summary["n"] == 2


def test_a_reference_that_cannot_be_compared_is_one_sentence(world):
    with pytest.raises(DataError, match=r"metrics: the answer of row 0 has no number.*correct the row, or choose"):
        luthier.evaluate({**world, "metrics": ["number"]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"metrics": ["exactly"]}, "must be one of exact.*did you mean exact"),
        ({"eval_dataset": None}, "its prompts are what the model answers"),
        ({"stage": "pt"}, "has rows without one answer each"),
    ],
)
def test_what_the_run_file_must_not_say(world, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        luthier.evaluate({**world, **change})


def test_answers_with_special_tokens_are_compared_with_such(world):
    """A reference has no stop token, since no answer has it."""
    shown = {**world, "skip_special_tokens": False, "metrics": ["exact"]}
    assert luthier.evaluate(shown).summary["exact"] == 6 / 8
