"""`eval_tasks`: what `luthier eval` measures, at each evaluation of a training run, without changing the run."""

import json
from pathlib import Path

import pytest

import luthier
from luthier.core.errors import ConfigError, DataError
from tests.evals.small_benchmark import write_benchmark
from tests.small_world import losses, small_world

TASKS = "perplexity,generation,mmlu_test"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    write_benchmark(root)
    return {
        **small_world(root),
        "max_steps": 4,
        "finetuning_type": "lora",
        "lora_dropout": 0.3,
        "eval_dataset": "numbers",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 8,
        "max_samples": 8,
        "max_new_tokens": 4,
        "task_dir": str(root),
        "n_shot": 1,
    }


def evaluations(result):
    return [logs for logs in result.log_history if "eval_loss" in logs]


def test_they_are_measured_at_each_evaluation(values):
    """The last numbers are those of `luthier eval` on what was trained; perplexity is exp(eval_loss)."""
    result = luthier.train({**values, "eval_tasks": TASKS, "do_sample": False})
    logs = evaluations(result)
    assert [entry["step"] for entry in logs] == [2, 4]
    names = {"eval_perplexity_perplexity", "eval_generation_exact", "eval_generation_f1", "eval_mmlu_test_accuracy"}
    assert all(names <= entry.keys() for entry in logs)
    after = luthier.evaluate({**values, "task": TASKS, "do_sample": False, "batch_size": 8}).summary["tasks"]
    assert logs[-1]["eval_perplexity_perplexity"] == pytest.approx(after["perplexity"]["perplexity"], rel=1e-4)
    assert logs[-1]["eval_perplexity_perplexity"] == pytest.approx(2.718281828 ** logs[-1]["eval_loss"], rel=1e-4)
    assert logs[-1]["eval_mmlu_test_accuracy"] == after["mmlu_test"]["accuracy"]
    assert logs[-1]["eval_generation_f1"] == pytest.approx(after["generation"]["f1"], abs=1e-6)
    log = Path(values["output_dir"], "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("eval_mmlu_test_accuracy" in json.loads(line) for line in log) == 2


def test_training_is_the_same_with_and_without_them(values, tmp_path):
    """Dropout and sampled answers draw random numbers; the losses are equal to the last bit."""
    keys = {**values, "do_sample": True, "eval_tasks": TASKS}
    with_tasks = luthier.train({**keys, "output_dir": str(tmp_path / "with")})
    without = luthier.train({**values, "output_dir": str(tmp_path / "without")})
    assert losses(with_tasks) == losses(without)


def test_several_evaluation_sets_ask_once(values):
    keys = {**values, "eval_dataset": "numbers,tools", "eval_on_each_dataset": True, "eval_tasks": "mmlu_test"}
    result = luthier.train(keys)
    found = [entry for entry in result.log_history if "eval_mmlu_test_accuracy" in entry]
    assert [entry["step"] for entry in found] == [2, 4]


def test_the_best_model_may_be_chosen_by_a_task(values):
    keys = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    best = {"metric_for_best_model": "perplexity_perplexity", "greater_is_better": False}
    result = luthier.train({**values, **keys, **best, "eval_tasks": "perplexity"})
    state = json.loads(Path(values["output_dir"], "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == min(entry["eval_perplexity_perplexity"] for entry in evaluations(result))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval_tasks": "harness/piqa"}, "names something that is not measured while training"),
        ({"eval_tasks": "pairwise"}, "names something that is not measured while training"),
        ({"eval_tasks": "mmlu_test", "eval_strategy": "no"}, "and there is none"),
        ({"eval_tasks": "perplexity", "metric_for_best_model": "eval_perplexity_perplexity"}, "lower perplexity"),
        ({"eval_tasks": "perplexity", "metric_for_best_model": "eval_mmlu_test_f1"}, "no evaluation of this version"),
    ],
)
def test_what_the_run_file_must_not_say(values, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        luthier.train({**values, **changes})


def test_bad_questions_stop_the_run_before_weights_are_loaded(values, said):
    with pytest.raises(DataError, match="mmlu"):
        luthier.train({**values, "eval_tasks": "mmlu_test", "task_dir": str(Path(values["dataset_dir"]))})
    assert not any("trainable parameters:" in line for line in said)
