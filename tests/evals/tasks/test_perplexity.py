"""Perplexity against training's own evaluation loss, and of a model that knows nothing."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import luthier
from tests.small_world import small_world

NAMES = ("infer_dtype", "model_name_or_path", "dataset_dir", "dataset", "template", "cutoff_len")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return {**small_world(tmp_path_factory.mktemp("world")), "infer_dtype": "float32"}


@pytest.fixture(scope="module")
def keys(world):
    return {**{name: world[name] for name in NAMES}, "task": "perplexity"}


def test_the_perplexity_of_a_zero_head_is_the_size_of_the_vocabulary(world, keys, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world["model_name_or_path"], dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    _beside(world, tmp_path)
    found = luthier.evaluate({**keys, "model_name_or_path": str(tmp_path)})
    assert found.summary["perplexity"] == pytest.approx(320, rel=1e-6)
    assert found.summary["standard_error"] == pytest.approx(0, abs=1e-3)


def _beside(world, folder):
    """The tokenizer of the world in the folder of another model."""
    from shutil import copy

    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(f"{world['model_name_or_path']}/{name}", folder)
    return {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataset": "tools"},
        {"dataset": "weighted"},
        {"cutoff_len": 30},
        {"train_on_prompt": True},
        {"stage": "pt", "dataset": "plain", "cutoff_len": 100},
    ],
    ids=str,
)
def test_it_is_that_of_training_on_the_same_rows(world, keys, changes, tmp_path):
    found = luthier.evaluate({**keys, **changes, "batch_size": 3})
    changes = dict(changes)
    evaluated = changes.pop("dataset", "numbers")
    rows = {"dataset": None, "eval_dataset": evaluated, "do_train": False, "do_eval": True}
    trained = luthier.train({**world, **rows, **changes, "output_dir": str(tmp_path)})
    loss = trained.metrics["eval"]["eval_loss"]
    assert found.summary["loss"] == pytest.approx(loss, abs=1e-6)
    assert found.summary["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_each_token_counts_the_same(keys):
    found = luthier.evaluate({**keys, "dataset": "numbers,tools"})
    per_row = [(record.values["loglikelihood"], record.values["num_tokens"]) for record in found.records]
    loss = -sum(logp for logp, _ in per_row) / sum(count for _, count in per_row)
    assert found.summary["perplexity"] == pytest.approx(math.exp(loss))
    assert found.table.splitlines()[0].split() == ["dataset", "rows", "tokens", "loss", "perplexity", "±"]
    assert [line.split()[0] for line in found.table.splitlines()[1:]] == ["numbers", "tools", "all"]
    task = found.tasks["perplexity"].task
    losses = task.measures(found.records)["perplexity"].scores
    assert losses[0] == pytest.approx(-per_row[0][0] / per_row[0][1])
    assert set(task.results(found.records)) == {"numbers", "tools"}


def test_the_standard_error_is_that_of_resampled_rows(keys):
    """Against the spread of the perplexity over 2,000 resamples of the rows."""
    found = luthier.evaluate({**keys, "dataset": "numbers,tools"})
    values = torch.tensor([[record.values["loglikelihood"], record.values["num_tokens"]] for record in found.records])
    chosen = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    sums = values[chosen].sum(1)
    assert found.summary["standard_error"] == pytest.approx((-sums[:, 0] / sums[:, 1]).exp().std().item(), rel=0.1)


def test_rows_without_labels_have_no_perplexity(keys):
    """And not that of a perfect model."""
    from luthier.config.load import load_eval
    from luthier.evals.task import Record
    from luthier.evals.tasks.perplexity import KIND

    task = KIND.open(load_eval(keys), "perplexity")
    records = [Record("", index, {"loglikelihood": 0.0, "num_tokens": 0}) for index in range(2)]
    summary = task.summary(records)
    assert summary["perplexity"] is summary["loss"] is summary["standard_error"] is None
    assert task.measures(records) == {} and task.table(records).splitlines()[-1].split() == ["all", "rows", "2", "0"]
