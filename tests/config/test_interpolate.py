"""Interpolations take other keys and environment variables, and what cannot be replaced is a problem."""

import pytest

from luthier.config.interpolate import interpolate
from luthier.config.load import load_train
from luthier.config.source import Entry, Written
from luthier.core.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


def resolved(environment=None, **values):
    written = Written("test", {name: Entry(value, "test") for name, value in values.items()})
    interpolate(written, environment or {})
    return {name: entry.value for name, entry in written.entries.items()}, [
        problem.reason for problem in written.problems
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${oc.env:NAME}", "eve"),
        ("${oc.env:NAME,other}", "eve"),
        ("${oc.env:NONE,other}", "other"),
        ("${oc.env:NONE,'a b'}", "a b"),
        ("${oc.env:NONE,null}", None),
        ("${oc.env:NONE,${number}}", "3"),
        ("saves/${oc.env:NAME}/${number}", "saves/eve/3"),
        ("${number}", 3),
        ("${flag}-x", "true-x"),
        ("${nested.deep.leaf}", [1]),
        ("${text}", "saves/eve"),
        (r"\${number}", "${number}"),
        ("$5 and {}", "$5 and {}"),
        (["${number}", {"k": "${text}"}], [3, {"k": "saves/eve"}]),
    ],
)
def test_it_is_replaced(text, expected):
    keys = {"number": 3, "flag": True, "nested": {"deep": {"leaf": [1]}}, "text": "saves/${oc.env:NAME}"}
    values, problems = resolved({"NAME": "eve"}, **keys, key=text)
    assert values["key"] == expected and problems == []


@pytest.mark.parametrize("text", ["${plain}", "${oc.env:NAME}"])
def test_a_value_that_is_taken_over_is_not_searched_again(text):
    values, problems = resolved({"NAME": "a${b}"}, plain=r"a\${b}", key=f"x {text} y", alone=text)
    assert problems == []
    assert (values["key"], values["alone"]) == ("x a${b} y", "a${b}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("${oc.env:NONE}", "the environment variable NONE is not set"),
        ("${unknown}", "refers to unknown, which is not given"),
        ("${other.leaf}", "refers to other.leaf, which is not given"),
        ("${key}", "refers to itself: key -> key"),
        ("${oc.decode:x}", "oc.decode is not known"),
        ("a ${other", "without its }"),
    ],
)
def test_it_cannot_be_replaced(text, reason):
    values, problems = resolved(key=text, other=1)
    assert len(problems) == 1 and reason in problems[0] and "key" not in values


def test_a_circle_through_another_key():
    _, problems = resolved(a="${b}", b="x${a}")
    assert len(problems) == 2 and "refers to itself: a -> b -> a" in problems[0]


def test_a_variable_has_the_type_of_its_key(monkeypatch):
    monkeypatch.setenv("RANK_OF_LORA", "16")
    monkeypatch.setenv("WARM", "true")
    run = load_train({**BASE, "lora_rank": "${oc.env:RANK_OF_LORA}", "bf16": "${oc.env:WARM}", "seed": "${lora_rank}"})
    assert run.adapter.lora_rank == 16 and run.training["bf16"] is True and run.training["seed"] == 16


def test_interpolation_on_the_command_line():
    run = load_train(BASE, ["run_name=${dataset}-${stage}", "stage=pt"])
    assert run.training["run_name"] == "d-pt"


def test_the_problem_names_file_line_and_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: ${oc.env:NO_SUCH_VARIABLE}\ndataset: d\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_train(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.line, problem.value) == ("output_dir", 2, "${oc.env:NO_SUCH_VARIABLE}")
    assert problem.remedy.startswith("set it")
