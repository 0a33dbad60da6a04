"""The table of rules is complete: every rule is broken by a small run here, and `explain` tells every rule."""

import pytest

from luthier.config import describe
from luthier.config.key_table import catalog
from luthier.config.load import Draft, read_source
from luthier.config.rules.engine import Rule
from luthier.config.rules.table import COMMAND_RULES, VARIANTS, all_rules, broken_rules
from tests.config.rules.broken import BASES, CASES, Case

LIBRARY_CHECKS = ("model.features.liger", "config.rules.optim", "config.rules.unsloth", "stages._reference")


def rules_broken_by(case: Case, monkeypatch: pytest.MonkeyPatch, rows: str) -> tuple[list[Rule], Draft]:
    for name in ("LOCAL_RANK", "FORCE_TORCHRUN", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    for module in LIBRARY_CHECKS:
        monkeypatch.setattr(f"luthier.{module}.is_installed", lambda name: case.has_libraries)
    base = {key: value for key, value in BASES[case.command].items() if key not in case.left_out}
    keys = {key: rows if value == "ROWS" else value for key, value in case.keys.items()}
    draft = Draft(case.command, read_source({**base, **keys}))
    return list(broken_rules(case.command, draft.run)), draft


@pytest.fixture
def rows(tmp_path) -> str:
    """A folder with tokenized rows."""
    (tmp_path / "rows.arrow").touch()
    return str(tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_broken_rule_is_told(case, monkeypatch, rows):
    broken, draft = rules_broken_by(case, monkeypatch, rows)
    assert case.blamed in [rule.keys[0] for rule in broken]
    assert case.blamed in [problem.key for problem in (*draft.problems, *draft.warnings)]


def test_every_rule_is_broken_by_a_case(rows):
    hit: set[int] = set()
    for case in CASES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            hit |= {id(rule) for rule in rules_broken_by(case, monkeypatch, rows)[0]}
    assert [(rule.keys, rule.reason) for rule, *_ in all_rules() if id(rule) not in hit] == []


def test_every_rule_is_explained():
    for rule, *_ in all_rules():
        for key in rule.keys:
            assert (not rule.file and rule.reason in describe.explain(key)) or rule.file == "environment"


def test_every_rule_speaks_of_keys_that_exist():
    assert {key for rule, *_ in all_rules() if not rule.file for key in rule.keys} <= catalog().keys()


def test_every_variant_with_rules_is_in_the_table():
    assert {registry.key for registry, _ in VARIANTS["train"]} >= {registry.key for registry, _ in VARIANTS["infer"]}
    assert COMMAND_RULES.keys() == VARIANTS.keys()


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "use_unsloth",
            "error in `luthier train` and `luthier chat` and `luthier eval`: rope_scaling (together with use_unsloth)",
        ),
        ("use_unsloth", "warning in `luthier export`: use_unsloth: is not read here"),
        ("use_kt", "error in `luthier train`: use_kt (together with deepspeed): makes its optimizer"),
        (
            "on_overlong",
            "error for stage: dpo or stage: rm: on_overlong (together with stage): cuts a row into several",
        ),
        ("quantization_bit", "error for quantization_method: hqq: quantization_bit"),
        ("galore_rank", "error for use_galore: galore_rank: must be at least 1"),
    ],
)
def test_what_explain_says_of_rules(key, line):
    assert line in describe.explain(key)


def test_what_explain_says_is_said_once():
    for name in ("packing", "ref_model", "lora_target", "stage"):
        lines = describe.explain(name).splitlines()
        assert len(lines) == len(set(lines))
