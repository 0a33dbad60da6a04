"""A character that only looks like a mark of YAML or JSON is named, with the line where it stands."""

import pytest

from luthier.config import lookalikes
from luthier.config.load import load_infer
from luthier.config.source import read
from luthier.core.errors import ConfigError

COLONS = "：﹕︰∶"
SPACES = "\u00a0\u2003\u200b\u202f\u3000\ufeff"
RUN = ["model_name_or_path: m", "template: default", "kwargs:", "  x: 1", "  y: 2", "lora_rank: 4", "run_name: r"]
KEY_LINES = [number for number, line in enumerate(RUN) if not line.endswith(":")]


def fault(tmp_path, lines, end="\n", name="run.yaml"):
    """The one problem of a run file, either fatal or beside what could be read."""
    path = tmp_path / name
    path.write_bytes(end.join([*lines, ""]).encode())
    try:
        problems = read(path, (), lambda name: True).problems
    except ConfigError as error:
        problems = error.problems
    (problem,) = problems
    return problem


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("number", KEY_LINES)
@pytest.mark.parametrize("colon", COLONS)
def test_another_colon_is_named_on_its_line(tmp_path, colon, number, end):
    lines = list(RUN)
    lines[number] = lines[number].replace(": ", f"{colon} ")
    problem = fault(tmp_path, lines, end)
    assert problem.line == number + 1 and lookalikes.named(colon) in problem.reason
    assert f"U+{ord(colon):04X}" in problem.reason and colon in problem.reason


@pytest.mark.parametrize("colon", COLONS)
def test_another_colon_on_every_line_is_named_on_the_first(tmp_path, colon):
    problem = fault(tmp_path, ["# run", "template" + colon + " x", "stage" + colon + " sft"])
    assert problem.line == 2 and lookalikes.named(colon) in problem.reason


@pytest.mark.parametrize("number", KEY_LINES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "place", [": {0}", ":{0}", "{0}: "], ids=["before the value", "in place of the space", "after the key"]
)
def test_another_space_is_named_on_its_line(tmp_path, space, number, place):
    lines = list(RUN)
    lines[number] = lines[number].replace(": ", place.format(space))
    problem = fault(tmp_path, lines)
    assert problem.line == number + 1 and lookalikes.named(space) in problem.reason


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("number", [1, 5, 6])
def test_another_space_before_a_key_or_after_a_value_is_named(tmp_path, space, number):
    for line in (space + RUN[number], RUN[number] + space):
        problem = fault(tmp_path, [*RUN[:number], line, *RUN[number + 1 :]])
        assert problem.line == number + 1 and lookalikes.named(space) in problem.reason
        if space != "\ufeff":  # which YAML refuses inside a file
            assert problem.key == RUN[number].partition(":")[0]


def test_another_space_in_a_list_is_named(tmp_path):
    problem = fault(tmp_path, ["a: 1", "b:", "  - x", "  - y\u00a0"])
    assert (problem.key, problem.line) == ("b", 4) and "no-break space (U+00A0)" in problem.reason


def test_another_comma_in_a_mapping_is_named(tmp_path):
    problem = fault(tmp_path, ["a: 1", "kwargs: {x: 1， y: 2}"])
    assert problem.line == 2 and "fullwidth comma '，' (U+FF0C)" in problem.reason


@pytest.mark.parametrize(
    ("text", "line"), [('{"a"： 1}', 1), ('{"a": 1，\n"b": 2}', 1), ('{"a": 1,\n\u00a0"b": 2}', 2)]
)
def test_json(tmp_path, text, line):
    problem = fault(tmp_path, [text], name="run.json")
    assert problem.line == line and "is not valid JSON: this line has a" in problem.reason


def test_a_value_that_is_not_told_is_not_shown(tmp_path):
    assert "secret" not in str(fault(tmp_path, ["hub_token: secret\u00a0"]))


def test_a_key_that_cannot_be_read_is_not_called_missing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("\u00a0model_name_or_path: m\ntemplate: default\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_infer(path)
    assert [problem.line for problem in caught.value.problems] == [1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 你好：世界，好\n", "你好：世界，好"),
        ('a: "\u3000x\u00a0"\n', "\u3000x\u00a0"),
        ("a: x\u00a0y – “z”\n", "x\u00a0y – “z”"),
        ("a: |\n  b： 1\n", "b： 1\n"),
        ("# b： 1\na: x\n", "x"),
    ],
)
def test_texts_may_hold_any_character(tmp_path, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    written = read(path, (), lambda name: True)
    assert written.problems == [] and written.entries["a"].value == value


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nbbb\nc: 3\n", 2), ("a: 1\nb: 'x\nc: 3\n", 2), ("a: 1\nb: “x”\nc: d: e\n", 3), ("a: 1\nb\n", 2)],
)
def test_the_line_of_a_fault_that_the_parser_notices_later(tmp_path, text, line):
    problem = fault(tmp_path, text.splitlines())
    assert problem.line == line and "this line has" not in problem.reason
