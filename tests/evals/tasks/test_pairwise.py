"""Pairs of answers of a tiny model, judged by a real server with a rule."""

import json

import pytest

import luthier
from luthier.core.errors import ConfigError, InvalidInput
from tests.evals.judge_server import always_first, by_rule, judge_server, the_longer
from tests.small_world import small_world
from tests.workflow.test_export import adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairwise")
    keys = small_world(root)
    return {
        **{name: keys[name] for name in ("model_name_or_path", "dataset_dir", "template")},
        "adapter_name_or_path": str(adapter(root / "model", root / "lora")),
        "finetuning_type": "lora",
        "eval_dataset": "numbers",
        "max_samples": 6,
        "max_new_tokens": 5,
        "do_sample": False,
        "task": "pairwise",
        "judge_model": "judge",
    }


def test_against_the_answers_of_the_dataset(world, tmp_path):
    """The judge prefers the longer one, so the lengths in the records decide, counted here."""
    with judge_server(by_rule(the_longer)) as server:
        found = luthier.evaluate({**world, "judge_url": server.url, "save_dir": str(tmp_path / "results")})
    records = [record.values for record in found.tasks["pairwise"].records]
    assert [one["other"] for one in records] == [f"{'very ' * (n % 5)}well: {n}" for n in range(6)]
    gains = [len(one["answer"].strip()) - len(one["other"]) for one in records]
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    assert (found.summary["wins"], found.summary["losses"], found.summary["n"]) == (wins, losses, 6)
    assert found.summary["win_rate"] == pytest.approx((wins + (6 - wins - losses) / 2) / 6)
    assert found.summary["judge"] == "judge"
    assert "win rate" in found.table
    assert "secret" not in (tmp_path / "results" / "run.json").read_text(encoding="utf-8")


def test_base_against_tuned_in_one_table(world, tmp_path):
    with judge_server(by_rule(always_first)) as server:
        found = luthier.evaluate(
            {**world, "judge_url": server.url, "compare": "base", "save_dir": str(tmp_path / "results")}
        )
    summary = found.summary
    assert (summary["ties"], summary["win_rate"]) == (6, 0.5)
    asked = sum(record.values["asked"] for record in found.tasks["pairwise"].records)
    assert asked > 0
    assert summary["consistency"] == 0.0
    (line,) = found.report.lines
    assert (line.metric, line.found.difference, line.verdict) == ("win_rate", 0, "not clear")
    base = [json.loads(line) for line in (tmp_path / "results/base/results.jsonl").read_text().splitlines()]
    assert [record.values["other"] for record in found.tasks["pairwise"].records] == [
        line["answer"].strip() for line in base
    ]


def test_an_answer_is_not_compared_with_results_that_hold_none(world, tmp_path):
    luthier.evaluate({**world, "task": "perplexity", "save_dir": str(tmp_path / "results")})
    keys = {**world, "judge_url": "http://127.0.0.1:1/v1", "compare": str(tmp_path / "results")}
    with pytest.raises(InvalidInput, match="holds no finished results of pairwise"):
        luthier.evaluate(keys)


@pytest.mark.parametrize(
    ("change", "sentence"), [({}, "judge_url: is missing"), ({"judge_model": None}, "judge_model: .*is missing")]
)
def test_a_judge_must_be_named(world, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        luthier.evaluate({**world, **change})


def test_an_address_that_is_none_is_refused_before_the_model_is_loaded(world):
    with pytest.raises(InvalidInput, match="judge_url: localhost:8000: not an address"):
        luthier.evaluate({**world, "judge_url": "localhost:8000", "model_name_or_path": world["model_name_or_path"]})
