"""The folder of results: what it takes to go on with unfinished ones, and killed at every moment."""

import json
import re

import pytest

from luthier.core.errors import OutputError
from luthier.evals.results import ResultsFolder
from luthier.evals.task import Record
from tests.killing import watching

IDENTITY = {"keys": {"task": "mmlu_test", "n_shot": 5}, "hashes": {"questions": "abc"}}
RECORDS = [Record("sums", index, {"value": index / 7}) for index in range(7)]
FILES = {"run.json", "results.jsonl", "results.json", "results.log", "summary.json"}


def write_all(folder, size=2):
    """What the loop does: groups of `size` records, then the results."""
    results = ResultsFolder(folder, IDENTITY)
    results.keep_groups(size, len(RECORDS))
    for start in range(len(results.records), len(RECORDS), size):
        results.add(RECORDS[start : start + size])
    results.finish({"sums": {}}, "the table", {"n": len(results.records)})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written(tmp_path):
    write_all(tmp_path / "out")
    found = content(tmp_path / "out")
    assert found.keys() == FILES
    assert [json.loads(line) for line in found["results.jsonl"].splitlines()] == [one.as_json() for one in RECORDS]
    assert found["results.log"] == b"the table\n" and json.loads(found["summary.json"]) == {"n": 7}


def test_killed_anywhere_the_same_command_ends_with_the_same_files(tmp_path):
    write_all(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    with watching(tmp_path / "counted") as changes:
        write_all(tmp_path / "counted")
    assert len(changes) > 10
    for kill_at in range(len(changes)):
        folder = tmp_path / str(kill_at)
        with watching(folder, kill_at):
            write_all(folder)
        if not (folder / "summary.json").exists():
            write_all(folder)
        assert content(folder) == expected, changes[kill_at]


def test_half_a_line_and_half_a_group_are_answered_again(tmp_path):
    results = ResultsFolder(tmp_path, IDENTITY)
    results.add(RECORDS[:3])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"subject": "su')
    again = ResultsFolder(tmp_path, IDENTITY)
    assert again.records == RECORDS[:3]
    again.keep_groups(2, len(RECORDS))
    assert again.records == RECORDS[:2]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_the_last_group_may_be_smaller(tmp_path):
    ResultsFolder(tmp_path, IDENTITY).add(RECORDS)
    again = ResultsFolder(tmp_path, IDENTITY)
    again.keep_groups(2, len(RECORDS))
    assert again.records == RECORDS


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = ResultsFolder(None, IDENTITY)
    results.keep_groups(2, 7)
    results.add(RECORDS)
    results.finish({}, "", {})
    assert results.records == RECORDS and not any(tmp_path.iterdir())


def refuses(folder, sentence, identity=IDENTITY):
    before = content(folder) if folder.is_dir() else None
    with pytest.raises(OutputError, match=re.escape(sentence)):
        ResultsFolder(folder, identity)
    assert before is None or content(folder) == before


def test_a_used_folder_is_refused(tmp_path):
    write_all(tmp_path / "done")
    refuses(tmp_path / "done", f"save_dir: {tmp_path / 'done'} holds finished results -> name a new folder in save_dir")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    refuses(tmp_path / "other", "exists and holds no results of this command -> name a new folder")
    (tmp_path / "file").write_text("mine")
    refuses(tmp_path / "file", "exists and holds no results of this command")
    (tmp_path / "empty").mkdir()
    write_all(tmp_path / "empty")


def test_results_of_another_command_are_refused(tmp_path):
    ResultsFolder(tmp_path, IDENTITY).add(RECORDS[:2])
    refuses(
        tmp_path, "another command (it differs in n_shot)", {**IDENTITY, "keys": {"task": "mmlu_test", "n_shot": 4}}
    )
    refuses(tmp_path, "another command (it differs in questions)", {**IDENTITY, "hashes": {"questions": "abd"}})
    refuses(tmp_path, "(it differs in seed)", {**IDENTITY, "keys": {**IDENTITY["keys"], "seed": 1}})


def test_lines_that_are_no_records(tmp_path):
    ResultsFolder(tmp_path, IDENTITY).add(RECORDS[:2])
    (tmp_path / "results.jsonl").write_text("[1]\n")
    refuses(tmp_path, "results.jsonl: this is not a results file")
