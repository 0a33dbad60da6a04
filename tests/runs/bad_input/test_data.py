"""Faults in dataset_info.json and in the data: told before the model is loaded, with file, place, reason and remedy."""

import json

import pytest

ROW = {"instruction": "Say hi.", "input": "", "output": "hi"}
ROWS = json.dumps([ROW] * 5, indent=1)
TALKS = {"formatting": "sharegpt"}


def talk(*roles: str) -> dict:
    return {"conversations": [{"from": role, "value": "something"} for role in roles]}


def test_missing_dataset(person):
    said = person.is_refused(dataset="nmbers")
    assert "run.yaml:2: dataset: 'nmbers': is not described in" in said
    assert "did you mean 'numbers'?" in said


def test_missing_evaluation_dataset(person):
    said = person.is_refused(eval_dataset="nothing", eval_strategy="steps")
    assert "eval_dataset: 'nothing': is not described in" in said
    assert "one of numbers, tools, weighted, pairs, feedback, plain" in said


def test_dataset_dir_without_a_description(person):
    assert "does not exist -> give the folder" in person.is_refused(dataset_dir=str(person.folder / "nowhere"))
    (person.folder / "empty").mkdir()
    assert "holds no dataset_info.json" in person.is_refused(dataset_dir=str(person.folder / "empty"))
    file = f"{person.keys['dataset_dir']}/dataset_info.json"
    assert "is a file -> give the folder" in person.is_refused(dataset_dir=file)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": "rows.json"}', '{"rows": {}}', '{"rows": {"file_nam": "x"}}']
)
def test_broken_description(person, text):
    keys = person.dataset(ROWS)
    (person.folder / "my data" / "dataset_info.json").write_text(text)
    assert "dataset_info.json" in person.is_refused(**keys)


def test_misspelt_key_of_a_description(person):
    said = person.is_refused(**person.dataset(ROWS, {"colums": {"prompt": "instruction"}}))
    assert "dataset_info.json:4: rows.colums: unknown key" in said
    assert "did you mean 'columns'?" in said


def test_file_absent(person):
    said = person.is_refused(**person.dataset(None))
    assert "rows.json: no such file -> correct `file_name`, or put the file there" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "holds no rows"),
        (b"[]", "holds no rows"),
        ('[{"instruction": "caf\xe9"}]'.encode("latin-1"), "not UTF-8 (byte 0xe9 at position 21)"),
        (ROWS.encode("utf-16"), "the file is UTF-16, not UTF-8"),
        (b"\x80\x04\x95\xff" * 99, "not UTF-8"),
        (ROWS[:150].encode(), "without the closing ']' -> it was cut off; write or download it again"),
        (ROWS.encode() + b"]", "text after the end of the list of rows"),
        (ROWS.replace('"output"', "output").encode(), "row 1 is not JSON"),
        (b"<html>not found</html>", "begins with '['"),
        (b"null", "begins with '['"),
        (b'{"rows": []}', "no such column"),
        (b'["a", "b"]', "no row can be used: a row is an object"),
        (json.dumps([{**ROW, "instruction": 7}]).encode(), "column 'instruction' is a number, not text"),
    ],
)
def test_unreadable_file(person, content, reason):
    said = person.is_refused(**person.dataset(content))
    assert "rows.json" in said or "rows.columns" in said
    assert reason in said


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", 'instruction,output\n"a,b\n', "a closing quote is missing"),
        ("rows.csv", "question,answer\na,b\n", "the data have no such column"),
        ("rows.parquet", "not a parquet", "not a readable parquet file"),
        ("rows.arrow", "not an arrow", "not a readable arrow file"),
        ("rows.xlsx", "not a table", "unknown kind of file 'xlsx' (one of json, "),
        ("rows.jsonl", '{"instruction": "a", "outp', "no row can be used: not JSON"),
    ],
)
def test_unreadable_file_of_another_kind(person, name, content, reason):
    assert reason in person.is_refused(**person.dataset(content, {"file_name": name}, name=name))


def test_truncated_last_line_is_dropped_and_reported(person):
    """A file of one object a line loses one row only; the account says which."""
    content = "\n".join([json.dumps(ROW)] * 4) + '\n{"instruction": "a", "outp'
    outcome = person.trains(**person.dataset(content, {"file_name": "rows.jsonl"}, name="rows.jsonl"), max_steps=1)
    assert outcome.status == 0
    assert "data rows: 5 rows = 4 kept + 1 dropped" in outcome.err
    assert "rows.jsonl, row 5" in outcome.err
    report = json.loads((person.out / "data_report.json").read_text())
    assert sum(report["datasets"]["rows"]["dropped"].values()) == 1


def test_wrong_columns(person):
    questions = json.dumps([{"question": "a", "answer": "b"}])
    said = person.is_refused(**person.dataset(questions))
    assert "'instruction': the data have no such column" in said
    assert 'add "columns": {"prompt": "question", "response": "answer"}' in said
    said = person.is_refused(**person.dataset(questions, {"columns": {"prompt": "questoin", "response": "answer"}}))
    assert "did you mean 'question'?" in said
    said = person.is_refused(**person.dataset(questions, {"columns": {"promt": "question", "response": "answer"}}))
    assert "did you mean 'prompt'?" in said


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("gpt", "human"), "message 1 has role 'gpt' where 'human' or 'observation' is expected"),
        (("human", "human"), "message 2 has role 'human'"),
        (("human", "gpt", "human"), "the conversation ends with message 3 of role 'human'"),
        (("user", "assistant"), "'user'"),
        ((), "no message"),
    ],
)
def test_roles_out_of_order(person, roles, reason):
    said = person.is_refused(**person.dataset(json.dumps([talk(*roles)] * 12), TALKS))
    assert "no row can be used" in said
    assert "rows.json, row 1" in said
    assert reason in said


def test_a_few_bad_rows_are_dropped_and_reported(person):
    rows = [talk("human", "gpt")] * 8 + [talk("gpt", "human")] * 2
    outcome = person.trains(**person.dataset(json.dumps(rows), TALKS), max_steps=1)
    assert outcome.status == 0
    assert "10 rows = 8 kept + 2 dropped" in outcome.err
    assert "rows.json, row 9; " in outcome.err


def test_no_row_is_short_enough(person):
    said = person.is_refused(cutoff_len=1)
    assert "dataset 'numbers' has no usable row" in said
    assert "24 dropped: no learned token is left after truncation to cutoff_len 1" in said
    assert "and 21 more" in said, "the list of rows is short"


def test_texts_too_short_for_a_block(person):
    said = person.is_refused(stage="pt", dataset="plain", cutoff_len=100_000)
    assert "too few for one block of 100000 -> lower cutoff_len" in said


def test_text_for_a_stage_that_needs_answers(person):
    assert "the row has no answer, and this stage needs one" in person.is_refused(dataset="plain")


def test_more_rows_set_aside_than_there_are(person):
    assert "val_size 24 takes 24 of 24 rows and leaves none to train on" in person.is_refused(val_size=24)


def test_rows_that_the_data_command_does_not_have(person):
    path = person.run_file()
    assert "there are rows 0 to 23" in person.is_refused_words("data", path, "--row", "99")
    assert "this run has no eval rows" in person.is_refused_words("data", path, "--split", "eval")


def test_names_with_blanks_and_commas_are_forgiven(person):
    path = person.run_file(dataset=" numbers , tools, ", dataset_dir=person.keys["dataset_dir"] + "/")
    assert person.types("check", path).status == 0
    assert "names a dataset twice" in person.types("check", person.run_file(dataset="numbers,numbers")).out


def test_dropping_the_last_batch_leaves_none(person):
    keys = {**person.dataset(ROWS), "dataloader_drop_last": True}
    said = person.is_refused(**keys, per_device_train_batch_size=6)
    assert "dataloader_drop_last: 5 rows are fewer than a batch, which has 6, so all would be left out" in said
    assert "lower per_device_train_batch_size" in said
