"""`luthier data RUN`: the rows as training will see them on stdout, the account of all rows on stderr."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.data.prepare import prepare
from luthier.workflow.text import load_text_side
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def shown(world, tmp_path, capsys):
    """Runs `luthier data` on a run file with the changes, and returns (status, stdout, stderr)."""

    def show(*words: str, **changes: Any) -> tuple[int, str, str]:
        run_file = tmp_path / "run.yaml"
        run_file.write_text(yaml.safe_dump({**world, **changes}), encoding="utf-8")
        capsys.readouterr()
        status = main(["data", str(run_file), *words])
        return status, *capsys.readouterr()

    return show


def prepared(values: dict[str, Any]) -> Any:
    run = load_train(values)
    return prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def add_dataset(world: dict[str, Any], name: str, rows: list[Any]) -> Path:
    path = Path(world["dataset_dir"], f"{name}.json")
    path.write_text(json.dumps(rows))
    info = Path(world["dataset_dir"], "dataset_info.json")
    info.write_text(json.dumps({**json.loads(info.read_text()), name: {"file_name": path.name}}))
    return path


def test_json_lines_are_the_rows_of_the_trainer(world, shown):
    status, out, err = shown("--json", "--limit", "0")
    rows = prepared(world).train
    assert status == 0
    assert [(line["input_ids"], line["labels"]) for line in objects(out)] == list(
        zip(rows["input_ids"], rows["labels"], strict=True)
    )
    assert all(line["attention_mask"] == [1] * len(line["input_ids"]) for line in objects(out))
    assert "24 rows = 24 kept + 0 dropped" in err


@pytest.mark.parametrize(
    ("words", "numbers"),
    [((), range(24)), (("--limit", "2"), range(2)), (("--limit", "0"), range(24)), (("--row", "7"), [7])],
)
def test_which_rows_are_shown_as_json(world, shown, words, numbers):
    _, out, _ = shown("--json", *words)
    rows = prepared(world).train
    assert [line["input_ids"] for line in objects(out)] == [rows[number]["input_ids"] for number in numbers]


@pytest.mark.parametrize("words", [("--limit", "-1"), ("--limit", "9" * 30), ("--limit", "few")])
def test_a_number_of_rows_that_cannot_be(world, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "run.yaml", *words])
    assert ended.value.code == 2 and f"argument {words[0]}: " in capsys.readouterr().err


def test_a_stream_is_shown_as_json_for_one_pass(world, shown):
    _, out, _ = shown("--json", streaming=True, max_steps=2)
    assert sorted(line["input_ids"] for line in objects(out)) == sorted(prepared(world).train["input_ids"])


def test_a_person_is_shown_a_few_rows(shown):
    _, out, _ = shown()
    assert out.count("--- train row") == 5


def test_evaluation_rows(world, shown):
    changes = {"val_size": 4}
    _, out, _ = shown("--json", "--split", "eval", **changes)
    assert [line["input_ids"] for line in objects(out)] == list(prepared({**world, **changes}).eval[""]["input_ids"])


def test_prompts_and_answers_for_generation(world, shown):
    changes = {"eval_dataset": "tools", "predict_with_generate": True, "cutoff_len": 300}
    _, out, _ = shown("--json", "--split", "eval", "--row", "1", **changes)
    (line,) = objects(out)
    row = prepared({**world, **changes}).prompts[""][1]
    assert (line["input_ids"], line["labels"]) == (row["input_ids"], row["labels"])
    _, out, _ = shown("--split", "eval", "--row", "1", **changes)
    assert out.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>\n⟧\n")


def test_a_prompt_as_long_as_its_answer_is_still_a_prompt(world, shown):
    answer = "a" * (len("user\nq\nassistant\n") + 1)
    add_dataset(world, "even", [{"instruction": "q", "output": answer}])
    keys = {"eval_dataset": "even", "predict_with_generate": True}
    _, out, _ = shown("--json", "--split", "eval", **keys)
    (line,) = objects(out)
    assert len(line["input_ids"]) == len(line["labels"])
    _, out, _ = shown("--split", "eval", **keys)
    assert out.endswith(f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>\n⟧\n")


def test_text_marks_what_is_learned(shown):
    status, out, _ = shown("--row", "3")
    assert status == 0
    assert out == (
        "--- train row 3: 60 tokens, 24 learned\n"
        "<|im_start|>user\nSay the number 3.<|im_end|>\n<|im_start|>assistant\n⟦very very very well: 3<|im_end|>\n⟧\n"
    )


def test_blocks_of_plain_text_are_shown_as_they_are_cut(world, shown):
    changes = {"stage": "pt", "dataset": "plain", "cutoff_len": 64}
    _, out, err = shown("--json", "--limit", "0", **changes)
    assert {len(line["input_ids"]) for line in objects(out)} == {64}
    assert "tokens left over, too few to fill a last block" in err


def test_dropped_rows_are_told_on_stderr(world, shown):
    path = add_dataset(world, "broken", [{"instruction": "q", "output": "a"}, {"instruction": "no answer"}])
    status, out, err = shown("--json", dataset="broken")
    assert status == 0 and len(objects(out)) == 1
    assert "2 rows = 1 kept + 1 dropped" in err and f"{path}, row 2" in err


def test_a_column_that_is_not_read_is_told_on_stderr(world, shown):
    add_dataset(world, "talks", [{"instruction": "q", "output": "a", "history": [["q0", "a0"]]}])
    status, out, err = shown("--json", dataset="talks")
    assert status == 0 and len(objects(out)) == 1
    assert "warning: " in err and "the column 'history' of the data is not read" in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--row", "24"), "there are rows 0 to 23"),
        (("--row", "-1"), "there are rows 0 to 23"),
        (("--split", "eval"), "this run has no eval rows"),
    ],
)
def test_what_is_not_there_is_said(shown, words, reason):
    status, out, err = shown(*words)
    assert (status, out) == (2, "") and reason in err


def test_looking_at_rows_needs_no_folder_to_write_to(shown, world, capsys):
    status, out, _ = shown("--json", "--limit", "1", output_dir=None)
    assert status == 0
    assert set(json.loads(out)) == {"input_ids", "attention_mask", "labels"}
    assert main(["train", *(f"--{key}={value}" for key, value in world.items() if key != "output_dir")]) == 2
    assert "output_dir: is missing" in capsys.readouterr().err


def test_tokens_without_room_in_the_embedding_are_a_warning(tmp_path, capsys):
    world = small_world(tmp_path, vocab_size=261)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**world, "template": "llama3"}), encoding="utf-8")
    assert main(["data", str(run_file), "--json", "--limit", "1"]) == 0
    captured = capsys.readouterr()
    assert max(json.loads(captured.out)["input_ids"]) >= 261
    assert "the embedding of the model has 261 rows" in captured.err
    assert main(["train", str(run_file)]) == 2
    assert "resize_vocab: true" in capsys.readouterr().err


NEEDS_MODEL_BESIDE = [
    ("ppo", "reward_model: is missing"),
    ("grpo", "reward_model: is missing"),
    ("gkd", "teacher_model: is missing"),
]
"""Stage -> what a run of it lacks while the reward or the teacher is not named."""


@pytest.mark.parametrize(("stage", "reason"), NEEDS_MODEL_BESIDE)
def test_looking_at_rows_needs_no_reward_and_no_teacher(shown, tmp_path, capsys, stage, reason):
    keys = {"stage": stage, "per_device_train_batch_size": 8}
    status, out, err = shown("--json", "--limit", "0", **keys)
    assert status == 0 and len(objects(out)) == 24, err
    assert shown("--doctor", **keys)[0] == 0
    assert main(["check", str(tmp_path / "run.yaml")]) != 0
    assert reason in "".join(capsys.readouterr())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_stops_training_does_not_hide_the_others(world, shown, tmp_path, streaming):
    answers = ["a", "a" * 500, "b", "c" * 500]
    path = add_dataset(world, "long", [{"instruction": "q", "output": answer} for answer in answers])
    changes = {"dataset": "long", "on_overlong": "error", "cutoff_len": 100, "streaming": streaming, "max_steps": 1}
    saved = {} if streaming else {"tokenized_path": str(tmp_path / "saved")}
    status, out, err = shown("--json", "--limit", "0", **changes, **saved)
    assert status == 2 and len(objects(out)) == 2, err
    assert f"luthier: training stops here: {path}, row 2: " in err and f"{path}, row 4" in err
    assert not (tmp_path / "saved").exists()
    whole = shown("--json", "--limit", "0", **{**changes, "cutoff_len": 1000})
    assert whole[0] == 0 and len(objects(whole[1])) == 4
