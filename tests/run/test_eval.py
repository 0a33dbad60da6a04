"""`luthier eval`: the table on stdout, exit statuses, and one sentence for each bad input."""

import pytest

from luthier import cli
from luthier.evals.tasks.multiple_choice import MultipleChoice
from tests.evals.small_benchmark import write_benchmark


@pytest.fixture
def words(llama_folder, tmp_path):
    write_benchmark(tmp_path)
    keys = ("template=default", "task=mmlu_test", "n_shot=0", "max_samples=1", f"task_dir={tmp_path}")
    return ["eval", f"model_name_or_path={llama_folder}", *keys]


def test_the_table_is_all_that_stdout_gets(words, capsys):
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["STEM", "Social Sciences", "Humanities", "Average"]


def test_ctrl_c_exits_with_130(words, capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MultipleChoice, "score", interrupted)
    assert cli.main([*words, f"save_dir={tmp_path / 'out'}"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("task=nothing", "task: 'nothing': nothing is measured under this name -> write perplexity"),
        ("task=nowhere_test", "task: nowhere_test: there is no folder"),
        ("task=perplexity", "dataset: is missing, and its rows are what perplexity is measured on"),
        ("n_shot=-1", "n_shot: '-1': must be at least 0"),
        ("save_dir={tmp_path}", "exists and holds no results of this command -> name a new folder in save_dir"),
        ("stage=rm", "stage: 'rm': trains a model that scores texts and writes none"),
    ],
)
def test_bad_input_exits_with_2(words, capsys, tmp_path, change, sentence):
    assert cli.main([*words, change.format(tmp_path=tmp_path)]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_without_a_task(llama_folder, capsys):
    assert cli.main(["eval", f"model_name_or_path={llama_folder}"]) == 2
    assert "task: is missing -> say what to measure" in capsys.readouterr().err
