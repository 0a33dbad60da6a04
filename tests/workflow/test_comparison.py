"""`compare`: base against tuned, and against earlier results, in one table."""

import json

import pytest

import luthier
from luthier.core.errors import ConfigError, InvalidInput, OutputError
from luthier.evals.results import SUMMARY_FILE
from luthier.workflow.comparison import saved
from tests.evals.small_benchmark import constant_model, write_benchmark
from tests.killing import watching
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A LoRA run that has learned the even ones of the numbers."""
    root = tmp_path_factory.mktemp("comparison")
    values = {**small_world(root), "finetuning_type": "lora", "learning_rate": 0.1, "val_size": 6}
    luthier.train(values)
    write_benchmark(root)
    return {**values, "task_dir": str(root), "n_shot": 0, "max_samples": 12, "do_sample": False, "max_new_tokens": 5}


@pytest.fixture
def keys(world, tmp_path):
    return {**world, "task": "perplexity", "compare": "base", "save_dir": str(tmp_path / "results")}


def by_name(found):
    return {(line.task, line.metric): line.found for line in found.report.lines}


def test_one_table_of_all_tasks(keys, tmp_path):
    """Perplexity and answers on the held-out rows, and a benchmark, each as if it were measured alone."""
    tasks = ["perplexity", "generation", "mmlu_test"]
    page = tmp_path / "page.html"
    found = luthier.evaluate({**keys, "task": tasks, "metrics": ["f1"], "html": str(page)})
    lines = by_name(found)
    assert list(lines) == [("perplexity", "perplexity"), ("generation", "f1"), ("mmlu_test", "accuracy")]
    alone = {**keys, "compare": None, "save_dir": None}
    base = {**alone, "do_train": False}
    tuned_loss, base_loss = (luthier.evaluate(one).summary["perplexity"] for one in (alone, base))
    held_out = lines["perplexity", "perplexity"]
    assert (held_out.base, held_out.tuned) == pytest.approx((base_loss, tuned_loss))
    assert held_out.num_questions == 6
    forgotten = lines["mmlu_test", "accuracy"]
    assert forgotten.num_questions == 36
    assert forgotten.base == luthier.evaluate({**base, "task": "mmlu_test"}).summary["accuracy"]
    assert found.table.splitlines()[0] == f"base   {keys['model_name_or_path']}"
    root = tmp_path / "results"
    assert json.loads((root / "comparison.json").read_text())["lines"][2]["task"] == "mmlu_test"
    assert json.loads((root / "summary.json").read_text())["tasks"].keys() == set(tasks)
    assert (root / "comparison.log").read_text() == found.table + "\n"
    assert (root / "generation" / "base" / "results.jsonl").is_file()
    assert "mmlu_test" in page.read_text(encoding="utf-8")


def test_flips_are_counted_and_shown(world, tmp_path):
    """A model that always says A against one that always says B, on a benchmark whose answers go A, B, C, D."""
    models = [str(constant_model(tmp_path / letter, {letter: 3.0})) for letter in "AB"]
    shared = {"task": "mmlu_test", "task_dir": world["task_dir"], "n_shot": 0, "template": "default"}
    luthier.evaluate({**shared, "model_name_or_path": models[0], "save_dir": str(tmp_path / "a")})
    found = luthier.evaluate({**shared, "model_name_or_path": models[1], "compare": str(tmp_path / "a")})
    line = by_name(found)["mmlu_test", "accuracy"]
    assert (line.base, line.tuned, line.difference) == (1 / 4, 1 / 4, 0)
    assert (line.num_better, line.num_worse, line.num_questions, line.p) == (9, 9, 36, 1.0)
    assert found.report.base == str(tmp_path / "a")
    assert [example.verdict for example in found.report.examples] == ["better"] * 3 + ["worse"] * 3
    better, worse = found.report.examples[0], found.report.examples[-1]
    assert (better.reference, better.base, better.tuned) == ("B", "A", "B")
    assert (worse.reference, worse.base, worse.tuned) == ("A", "A", "B")


def test_finished_results_are_taken_and_unfinished_ones_go_on(keys, tmp_path, said):
    """A run that was killed after the base was measured, then the same command."""
    folder = tmp_path / "results"
    with watching(tmp_path / "whole") as changes:
        luthier.evaluate({**keys, "save_dir": str(tmp_path / "whole")})
    last_of_base = max(number for number, change in enumerate(changes) if " base/" in change)
    with watching(folder, kill_at=last_of_base + 4):
        luthier.evaluate(keys)
    assert (folder / "base" / "summary.json").is_file() and not (folder / "comparison.json").exists()
    before = (folder / "base" / "results.jsonl").stat().st_mtime_ns
    found = luthier.evaluate(keys)
    assert (folder / "base" / "results.jsonl").stat().st_mtime_ns == before
    assert found.table == luthier.evaluate({**keys, "save_dir": None}).table
    with pytest.raises(OutputError, match="holds finished results -> name a new folder"):
        luthier.evaluate(keys)


def test_an_earlier_evaluation_becomes_the_tuned_side(keys, tmp_path, said):
    luthier.evaluate({**keys, "compare": None})
    said.clear()
    luthier.evaluate(keys)
    assert len([line for line in said if line.startswith("ready: ")]) == 1  # the base alone is loaded


def test_a_metric_that_the_earlier_results_lack_has_no_line(keys, tmp_path):
    earlier = {**keys, "task": "generation", "compare": None, "do_train": False, "metrics": ["exact"]}
    luthier.evaluate({**earlier, "save_dir": str(tmp_path / "earlier")})
    now = {**keys, "task": "generation", "compare": str(tmp_path / "earlier"), "metrics": ["f1", "exact"]}
    assert list(by_name(luthier.evaluate(now))) == [("generation", "exact")]


def test_other_questions_are_not_compared(keys, tmp_path):
    luthier.evaluate({**keys, "compare": None, "seed": 1, "save_dir": str(tmp_path / "other")})
    with pytest.raises(InvalidInput, match=r"answered other questions of perplexity \(rows.* differ\)"):
        luthier.evaluate({**keys, "compare": str(tmp_path / "other")})


@pytest.mark.parametrize("content", ["[]", "{}", '{"task": "perplexity"}', '{"task": "perplexity", "hashes": 1}'])
def test_a_summary_of_another_program_is_no_result(tmp_path, content):
    (tmp_path / SUMMARY_FILE).write_text(content)
    with pytest.raises(InvalidInput, match="holds no finished results of perplexity"):
        saved(tmp_path, "perplexity", ("perplexity",))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"do_train": False}, "so it is its own base -> name the run file of the training"),
        ({"compare": "nowhere"}, "compare: nowhere holds no finished results of perplexity"),
    ],
)
def test_what_cannot_be_compared(keys, changes, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        luthier.evaluate({**keys, **changes})


def test_a_page_that_cannot_be_written_is_told_before_anything_is_measured(keys, tmp_path):
    with pytest.raises(OutputError, match=r"html: .*this is a folder -> name a file in it"):
        luthier.evaluate({**keys, "html": str(tmp_path)})
    assert not (tmp_path / "results").exists()


def test_a_page_without_a_comparison(keys):
    with pytest.raises(ConfigError, match=r"html: .*nothing is compared"):
        luthier.evaluate({**keys, "compare": None, "html": "page.html"})


def test_rows_that_were_learned_are_noted(keys, said):
    found = luthier.evaluate({**keys, "val_size": 0})
    assert any("was trained on these rows" in note for note in found.report.notes)
