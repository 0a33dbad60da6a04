"""What the board shows of evaluations, from the files that `luthier eval` writes."""

import json

import luthier
from luthier.core.manifest import RECORD
from luthier.webui import form
from luthier.webui.evaluations import MAX_RECORDS, evaluations_of, records_in, tables_in, words_for
from luthier.webui.runs import find_runs, read_run
from tests.small_world import small_world
from tests.workflow.test_export import adapter


def test_tables_records_and_the_run_that_was_measured(tmp_path):
    """A comparison of two tasks, in the folder that the board names for it."""
    world = small_world(tmp_path)
    tuned = adapter(tmp_path / "model", tmp_path / "tuned")
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / RECORD).write_text("{}")
    (save_dir,) = words_for(folder)
    keys = {name: world[name] for name in ("model_name_or_path", "dataset_dir", "template")}
    keys |= {"adapter_name_or_path": str(tuned), "eval_dataset": "numbers", "max_new_tokens": 3, "compare": "base"}
    found = luthier.evaluate(
        {**keys, "task": ["generation", "perplexity"], "max_samples": 4, "save_dir": save_dir.partition("=")[2]}
    )
    assert tables_in(folder) == {"": found.table}
    records = records_in(folder)
    assert [row[1] for row in records] == [*"0123"] * 2
    assert "answer: " in records[0][2] and "loglikelihood: " in records[-1][2]
    runs = find_runs(tmp_path)
    assert [run.folder for run in evaluations_of(tuned.resolve(), runs)] == [folder]
    assert evaluations_of((tmp_path / "data").resolve(), runs) == []


def test_several_tasks_without_a_comparison_have_a_table_each(tmp_path):
    for name in ("generation", "mmlu_test"):
        place = tmp_path / "results" / name
        place.mkdir(parents=True)
        (place / "results.log").write_text(f"the table of {name}\n")
    assert tables_in(tmp_path) == {
        "generation": "the table of generation",
        "mmlu_test": "the table of mmlu_test",
    }


def test_files_of_any_state_can_be_read(tmp_path):
    """No evaluation, an unfinished one with half a line, and one with more records than are shown."""
    assert (tables_in(tmp_path), records_in(tmp_path)) == ({}, [])
    results = tmp_path / "results"
    results.mkdir()
    line = json.dumps({"subject": "s", "index": 1, "answer": "x" * 5000})
    (results / "results.jsonl").write_text(f"{line}\n" * 100 + line[:20])
    assert len(records_in(tmp_path)) == MAX_RECORDS
    assert len(records_in(tmp_path)[0][2]) < 700
    (results / "results.jsonl").write_text(line[:20])
    assert records_in(tmp_path) == []


def test_odd_values_in_the_files_of_an_evaluation(tmp_path):
    own, folder = tmp_path / "own", tmp_path / "evaluation"
    (folder / "results").mkdir(parents=True)
    own.mkdir()
    lines = ["null", "5", "[" * 9999, '{"subject": "\\ud800"}', '{"index": 1}']
    (folder / "results" / "results.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert records_in(folder) == [["", "1", ""]]
    tasks = {"a": 5, "b": {"model": "a\0b", "adapters": [1, str(own)]}, "c": {"model": {}}}
    (folder / "results" / "summary.json").write_text(json.dumps({"tasks": tasks}))
    evaluation = read_run(folder)
    assert evaluations_of(own, [evaluation]) == [evaluation]
    assert evaluations_of(tmp_path / "other", [evaluation]) == []


def test_the_form_of_an_evaluation():
    """Its usual keys stand first, and its folder is save_dir."""
    names = [field.name for field in form.groups("eval", {})[0].fields]
    assert {"task", "compare", "save_dir", "judge_url"} <= set(names)
    assert form.folder_in("save_dir: here\noutput_dir: there\n", "eval") == "here"
    assert form.folder_in("output_dir: there\n", "train") == "there"
