"""Changing one key of a run file changes its line and nothing else."""

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from luthier.config.decode import Loader
from luthier.webui.document import as_yaml, differing, values_of, with_value

TEXT = """\
# first
stage: sft   # the method
lora_target: [q_proj, v_proj]
lr_scheduler_kwargs:
  num_cycles: 2   # inner

# before the rate
learning_rate: 1.0e-4
dataset:
- one
- two
"""


def test_values_are_shown_as_they_were_written():
    assert values_of(TEXT) == {
        "stage": "sft",
        "lora_target": "q_proj, v_proj",
        "lr_scheduler_kwargs": "{num_cycles: 2}",
        "learning_rate": "1.0e-4",
        "dataset": "one, two",
    }
    assert values_of("") == values_of("[1") == values_of("- 1") == {}


@pytest.mark.parametrize(
    ("key", "value", "old", "new"),
    [
        ("stage", "dpo", "stage: sft   # the method\n", "stage: dpo   # the method\n"),
        ("learning_rate", "3e-4", "learning_rate: 1.0e-4\n", "learning_rate: 3e-4\n"),
        ("learning_rate", None, "learning_rate: 1.0e-4\n", ""),
        ("lr_scheduler_kwargs", "{}", "lr_scheduler_kwargs:\n  num_cycles: 2   # inner\n", "lr_scheduler_kwargs: {}\n"),
        ("dataset", "three", "dataset:\n- one\n- two\n", "dataset: three\n"),
        ("seed", "1", "- two\n", "- two\nseed: 1\n"),
        ("seed", None, "", ""),
    ],
)
def test_only_the_lines_of_the_key_change(key, value, old, new):
    assert with_value(TEXT, key, value) == TEXT.replace(old, new, 1)


def test_a_text_without_keys_gets_one_and_a_broken_one_stays():
    assert with_value("", "seed", "1") == "seed: 1\n"
    assert with_value("# note", "seed", "1") == "# note\nseed: 1\n"
    assert with_value("stage: [", "seed", "1") == "stage: ["
    assert with_value("{stage: sft}", "seed", "1") == "{stage: sft}"


@pytest.mark.parametrize(
    ("typed", "is_text", "written"),
    [
        ("1e-4", False, "1e-4"),
        ("true", False, "true"),
        ("eight", False, "eight"),
        ("models/a b.gguf", True, "models/a b.gguf"),
        ("12", True, "'12'"),
        ("no", True, "'no'"),
        ("0E0", True, "'0E0'"),
        ("a: b", True, "'a: b'"),
        ("# a", True, "'# a'"),
        ("{'a': 1}", True, "{'a': 1}"),
        ("[q_proj, v_proj]", True, "[q_proj, v_proj]"),
        ("null", False, "'null'"),
    ],
)
def test_what_is_typed_is_written_as_its_kind(typed, is_text, written):
    assert as_yaml(typed, is_text=is_text) == written


@given(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1))
def test_any_text_comes_back_from_the_file(typed):
    written = as_yaml(typed, is_text=True)
    read = yaml.load(with_value(TEXT, "output_dir", written), Loader)
    assert read["output_dir"] == typed or typed[0] in "[{"
    assert read["seed"] == 1 if "seed" in read else read["stage"] == "sft"


def test_a_date_that_is_none_and_an_alias_without_end():
    assert as_yaml("2024-02-30", is_text=True) == "'2024-02-30'"
    assert values_of("a: &a\n  b: *a\n") == {}


def test_differing_keys_of_several_run_files():
    assert differing({"a": "x: 1\ny: 2", "b": "y: 2\nx: 3", "c": "y: 2"}) == {"x": {"a": "1", "b": "3", "c": None}}


@pytest.mark.parametrize("is_text", [True, False])
@given(
    value=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(["a: b", "- x", "v # x", "1\t#", "12", "no", "null", "1e-4", "2026-01-01", "!x", "a\x85b"]),
    )
)
def test_any_text_in_a_field_is_that_text_in_the_file(value, is_text):
    """A number or switch may be one in the file too: the form shows the same."""
    assume(value.strip()[:1] not in ("[", "{"))  # lists and mappings are meant as such
    assert values_of(f"key: {as_yaml(value, is_text=is_text)}\nother: 1\n") == {"key": value.strip(), "other": "1"}
