"""What is written for a value is read as the same value."""

import pytest

from luthier.config.encode import escaped, to_yaml
from luthier.config.load import load_train, read_text

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    "name", ["1e-4", "1E5", "-3e2", "12", "1.5", "true", "null", "2024-02-01", "a: b", "x # y", ""]
)
def test_a_text_stays_a_text(name):
    assert read_text(to_yaml({"run_name": name}), "run.yaml").entries["run_name"].value == name


@pytest.mark.parametrize("value", [1e-4, 1e22, -3e-7, 3, True, None, ["a", "1e5"], {"a": {"b": [1e-9]}}])
def test_other_values_keep_their_type(value):
    assert read_text(to_yaml({"key": value}), "run.yaml").entries["key"].value == value


def test_what_looks_like_an_interpolation():
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": [r"\${y}"]}}
    run = load_train({**BASE, "run_name": r"a\${b}", **schedule})
    assert run.given["run_name"] == "a${b}"
    again = read_text(to_yaml(escaped(run.given)), "run.yaml")
    assert again.problems == []
    values = {name: entry.value for name, entry in again.entries.items()}
    assert (values["run_name"], values["lr_scheduler_kwargs"]) == ("a${b}", {"decay_type": ["${y}"]})
