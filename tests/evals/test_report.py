"""The report as text."""

import pytest

from luthier.evals.measure import mean_of, perplexity_of
from luthier.evals.paired import compare
from luthier.evals.report import Example, Line, Report, as_text

FOUND = compare(mean_of([0] * 8 + [1] * 4), mean_of([1] * 12))
WORSE = compare(perplexity_of([20.0, 21.0], [10, 10]), perplexity_of([30.0, 31.0], [10, 10]))
EXAMPLE = Example("mmlu_test", "accuracy", "better", "towns 3", "Where\nis it?", "B", "A", "B\x1b[31m")


def test_each_metric_has_a_verdict():
    """Eight of twelve questions flipped, all to the better; exp(20.5 / 10) and exp(30.5 / 10)."""
    lines = [Line("mmlu_test", "accuracy", "higher", FOUND), Line("perplexity", "perplexity", "lower", WORSE)]
    assert [line.verdict for line in lines] == ["better", "worse"]
    cells = lines[0].cells
    assert cells[:5] == ("mmlu_test", "accuracy", "0.3333", "1.0000", "+0.6667")
    assert cells[6:] == ("0.0078", "8", "0", "12", "better")
    assert lines[1].cells[2:5] == ("7.77", "21.12", "+13.35")
    assert lines[1].cells[6] == ""


def test_an_interval_that_holds_zero_is_not_clear():
    assert Line("t", "m", "higher", compare(mean_of([0, 1]), mean_of([1, 1]))).verdict == "not clear"
    assert Line("t", "m", "higher", compare(mean_of([0.5]), mean_of([0.7]))).cells[5] == "-"


def test_the_text_shows_table_notes_and_examples():
    report = Report("base model", "tuned model", [Line("mmlu_test", "accuracy", "higher", FOUND)], [EXAMPLE], ["Mind."])
    text = as_text(report)
    head, line = text.splitlines()[3:5]
    assert head.split()[:4] == ["task", "metric", "base", "tuned"]
    assert line.index("0.3333") + len("0.3333") == head.index("base") + len("base")
    assert "better by accuracy: mmlu_test towns 3" in text
    assert "Mind." in text


@pytest.mark.parametrize("text", ["B\x1b[31m", "a\rb", "\x07"])
def test_what_a_model_says_does_not_steer_the_terminal(text):
    example = Example("t", "m", "worse", "0", text, text, text, text)
    assert not set(as_text(Report("b", "t", [], [example]))) & set("\x1b\r\x07")


def test_long_answers_are_cut():
    example = Example("t", "m", "worse", "0", "word " * 1000, "", "x" * 5000, "short")
    assert max(map(len, as_text(Report("b", "t", [], [example])).splitlines())) < 450
