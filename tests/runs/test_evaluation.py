"""Evaluation: losses and accuracies equal those computed row by row, and decisions that depend on them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.core.kinds import STAGES
from luthier.core.manifest import verify_folder
from luthier.data.prepare import prepare
from luthier.training.parts import with_fillers
from luthier.workflow.text import load_text_side
from tests.small_world import losses, small_world

EVALUATES = {"do_train": False, "do_eval": True, "eval_dataset": "numbers,tools", "cutoff_len": 300}
TRAINS = {"per_device_train_batch_size": 8, "eval_dataset": "numbers", "eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 3, "infer_dtype": "float32"}


def by_hand(values: dict[str, Any], folder: str | None = None) -> dict[str, tuple[float, float]]:
    """Set -> (sum of token losses / number of labeled tokens, mean over rows of the share of tokens guessed right)."""
    from transformers import AutoModelForCausalLM

    run = load_train(values)
    data = prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)
    model = AutoModelForCausalLM.from_pretrained(folder or values["model_name_or_path"], dtype=torch.float32).eval()
    return {name: of_rows(model, rows) for name, rows in data.eval.items()}


@torch.no_grad()
def of_rows(model: Any, rows: Any) -> tuple[float, float]:
    total, count, accuracies = 0.0, 0, []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        learned = labels != -100
        total += torch.nn.functional.cross_entropy(logits[learned], labels[learned], reduction="sum").item()
        count += int(learned.sum())
        accuracies.append((logits.argmax(-1) == labels)[learned].float().mean().item())
    return total / count, sum(accuracies) / len(accuracies)


def results(values: dict[str, Any], split: str = "eval") -> dict[str, Any]:
    return json.loads(Path(values["output_dir"], f"{split}_results.json").read_text(encoding="utf-8"))


def evaluations(result: Any) -> list[dict[str, Any]]:
    return [logs for logs in result.log_history if any(name.startswith("eval_") for name in logs)]


@pytest.mark.parametrize(("batch_size", "packing"), [(1, None), (5, None), (64, None), (2, True)])
def test_loss_and_accuracy_do_not_depend_on_the_batch_size(values, batch_size, packing):
    keys = {
        **EVALUATES,
        "compute_accuracy": True,
        "per_device_eval_batch_size": batch_size,
        "packing": packing,
        "label_smoothing_factor": 0.1,
    }
    result = luthier.train({**values, **keys})
    loss, accuracy = by_hand({**values, **EVALUATES})[""]
    assert result.metrics["eval"]["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert result.metrics["eval"]["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert results(values)["eval_loss"] == result.metrics["eval"]["eval_loss"]


@pytest.mark.parametrize("packing", [None, True])
def test_filler_rows_of_the_last_batch_of_several_processes_do_not_count(values, packing):
    keys = {**values, **EVALUATES, "packing": packing}
    run = load_train(keys)
    rows = prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding).eval[""]
    filled = with_fillers(rows, 32)
    assert len(filled) % 32 == 0 and len(filled) > len(rows)
    assert list(filled.select(range(len(rows)))) == list(rows)
    assert all(label == -100 for row in filled.select(range(len(rows), len(filled))) for label in row["labels"])
    assert with_fillers(rows, len(rows)) is rows


def test_evaluation_alone_trains_nothing(values):
    result = luthier.train({**values, **EVALUATES})
    assert losses(result) == [] and set(result.metrics) == {"eval"}
    names = {path.name for path in Path(values["output_dir"]).iterdir()}
    assert names == {"eval_results.json", "all_results.json", "eval_data_report.json", "trainer_log.jsonl"}


def test_each_dataset_apart(values):
    result = luthier.train({**values, **EVALUATES, "eval_on_each_dataset": True, "compute_accuracy": True})
    hand = by_hand({**values, **EVALUATES, "eval_on_each_dataset": True})
    assert set(hand) == {"numbers", "tools"}
    for name, (loss, accuracy) in hand.items():
        assert result.metrics["eval"][f"eval_{name}_loss"] == pytest.approx(loss, abs=1e-5)
        assert result.metrics["eval"][f"eval_{name}_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert "eval_loss" not in result.metrics["eval"]


def test_perplexity_of_plain_text(values):
    keys = {**EVALUATES, "stage": "pt", "eval_dataset": "plain", "dataset": None, "cutoff_len": 64}
    result = luthier.train({**values, **keys})
    loss, _ = by_hand({**values, **keys})[""]
    assert result.metrics["eval"]["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert results(values)["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(("val_size", "num_eval"), [(0.25, 6), (5, 5)])
def test_rows_set_aside_are_evaluated_and_not_trained_on(values, val_size, num_eval):
    keys = {"val_size": val_size, "eval_strategy": "epoch", "do_eval": True, "max_steps": -1, "num_train_epochs": 2}
    result = luthier.train({**values, **keys})
    report = json.loads(Path(values["output_dir"], "data_report.json").read_text())
    assert report["samples"] == {"train": 24 - num_eval, "eval": num_eval}
    assert [logs["epoch"] for logs in evaluations(result)] == [1.0, 2.0, 2.0]
    loss, _ = by_hand({**values, **keys}, values["output_dir"])[""]
    assert result.metrics["eval"]["eval_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_rows_that_training_drops_are_evaluated(values, batch_size):
    keys = {**values, **TRAINS, "per_device_eval_batch_size": batch_size}
    dropping = luthier.train({**keys, "dataloader_drop_last": True})
    whole = luthier.train(keys)
    seen, expected = ([logs["eval_loss"] for logs in evaluations(result)] for result in (dropping, whole))
    assert seen == expected and len(seen) == 3


def test_evaluations_on_the_way_change_no_training_loss(values):
    keys = {"finetuning_type": "lora", "lora_dropout": 0.3, "disable_shuffling": False}
    quiet = luthier.train({**values, **keys})
    result = luthier.train({**values, **keys, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": "numbers"})
    assert [logs["step"] for logs in evaluations(result)] == [2, 3]  # and at the end, as transformers does
    assert losses(result) == losses(quiet)


def test_the_best_model_is_the_one_that_is_kept(values):
    """A rate that is far too high makes each step worse, so the first is the best."""
    keys = {
        **TRAINS,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "do_eval": True,
    }
    result = luthier.train({**values, **keys})
    seen = [logs["eval_loss"] for logs in evaluations(result)]
    best = min(seen)
    assert best < seen[2]
    assert result.metrics["eval"]["eval_loss"] == pytest.approx(best, abs=1e-5)
    loss, _ = by_hand({**values, **keys}, values["output_dir"])[""]
    assert loss == pytest.approx(best, abs=1e-5)


WORSENS = {**TRAINS, "learning_rate": 5.0, "lr_scheduler_type": "constant", "max_steps": 12, "save_steps": 1}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"metric_for_best_model": "eval_accuracy", "greater_is_better": True, "compute_accuracy": True},
        {"save_strategy": "steps", "load_best_model_at_end": True},
        {
            "eval_on_each_dataset": True,
            "eval_dataset": "numbers,tools",
            "metric_for_best_model": "eval_numbers_loss",
            "cutoff_len": 300,
        },
    ],
    ids=["no metric", "accuracy", "best model", "of one dataset"],
)
def test_training_stops_early_when_nothing_improves(values, keys):
    result = luthier.train({**values, **WORSENS, "early_stopping_steps": 2, **keys})
    name = keys.get("metric_for_best_model", "eval_loss")
    seen = [logs[name] for logs in evaluations(result) if name in logs]
    better = max if keys.get("greater_is_better") else min
    assert len(seen) < 12
    assert better(seen) == seen[-3] and len(losses(result)) == len(seen)


@pytest.mark.parametrize(
    "keys", [{"early_stopping_steps": 2}, {"load_best_model_at_end": True, "save_strategy": "steps"}]
)
def test_with_several_losses_the_best_metric_must_be_named(values, keys):
    several = {**WORSENS, "eval_on_each_dataset": True, "eval_dataset": "numbers,tools", "cutoff_len": 300}
    with pytest.raises(ConfigError, match=r"metric_for_best_model.*eval_<name of the set>_loss"):
        luthier.train({**values, **several, **keys})


@pytest.mark.parametrize("keys", [{}, {"eval_tasks": "perplexity"}, {"stage": "dpo"}, {"stage": "kto"}], ids=str)
@pytest.mark.parametrize("metric", ["eval_accuracy", "rouge-l"])
def test_a_metric_that_no_evaluation_gives_is_refused(values, keys, metric):
    keys = {**WORSENS, "early_stopping_steps": 2, "metric_for_best_model": metric, **keys}
    with pytest.raises(ConfigError, match=f"metric_for_best_model: '{metric}': is not measured by the evaluations of"):
        load_train({**values, **keys})


OF_STAGE = {
    "pt": {"dataset": "plain", "cutoff_len": 48},
    "sft": {"compute_accuracy": True},
    "rm": {"dataset": "pairs"},
    "dpo": {"dataset": "pairs"},
    "kto": {"dataset": "feedback", "val_size": 8},
    "gkd": {},
}


@pytest.mark.parametrize("stage", OF_STAGE)
def test_every_metric_that_a_stage_names_is_measured(values, stage):
    keys = {**OF_STAGE[stage], "stage": stage, "teacher_model": values["model_name_or_path"], "max_steps": 1}
    evaluation = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    keys = (
        {**values, **evaluation, **keys} if stage == "gkd" else {**values, **evaluation, **keys, "teacher_model": None}
    )
    (measured,) = [logs for logs in luthier.train(keys).log_history if "eval_loss" in logs]
    run = load_train(keys)
    named = STAGES.get(stage).reporting.evaluated(run.method)
    assert named and {f"eval_{name}" for name in named} <= measured.keys()
    for name in named:
        load_train({**keys, "metric_for_best_model": name, "greater_is_better": False})


GENERATES = {"predict_with_generate": True, "max_new_tokens": 6, "do_sample": False, "per_device_eval_batch_size": 5}
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def test_prediction_writes_prompts_answers_and_labels(values):
    keys = {**GENERATES, "do_train": False, "do_predict": True, "eval_dataset": "numbers", "max_samples": 7}
    result = luthier.train({**values, **keys})
    folder = Path(values["output_dir"])
    lines = [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 7 and all(set(line) == {"prompt", "predict", "label"} for line in lines)
    assert [line["prompt"] for line in lines] == [
        f"<|im_start|>user\nSay the number {number}.<|im_end|>\n<|im_start|>assistant\n" for number in range(7)
    ]
    assert [line["label"] for line in lines] == [f"{'very ' * (n % 5)}well: {n}" for n in range(7)]
    assert {f"predict_{name}" for name in SCORES} <= set(results(values, "predict"))
    assert result.metrics["predict"] == results(values, "predict")
    assert [line["predict"] for line in lines] == greedy_answers(values["model_name_or_path"], lines)


def test_neither_answers_nor_labels_have_the_token_at_which_an_answer_stops(values, monkeypatch):
    """Also where special tokens are shown: a model that says what the data say has full marks."""
    from luthier.infer import batch

    def as_given(model, tokenizer, prompts, settings, stop_ids, batch_size, **options):
        for number in range(len(prompts)):
            ids = tokenizer.encode(f"{'very ' * (number % 5)}well: {number}<|im_end|>", add_special_tokens=False)
            assert ids[-1] in stop_ids
            yield batch._without_stop(ids, stop_ids)

    monkeypatch.setattr(batch, "generate_answers", as_given)
    keys = {**GENERATES, "do_train": False, "do_predict": True, "eval_dataset": "numbers", "max_samples": 7}
    result = luthier.train({**values, **keys, "skip_special_tokens": False})
    assert [result.metrics["predict"][f"predict_{name}"] for name in SCORES] == [100.0] * len(SCORES)
    text = (Path(values["output_dir"]) / "generated_predictions.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 7 and all(line["predict"] == line["label"] and "<|" not in line["label"] for line in lines)


def greedy_answers(folder: str, lines: list[dict[str, str]]) -> list[str]:
    """One prompt at a time through plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for line in lines:
        ids = tokenizer(line["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=258, pad_token_id=256)[
            0, ids.shape[1] :
        ]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


def test_scores_while_training(values):
    keys = {**GENERATES, "eval_dataset": "numbers", "eval_strategy": "steps", "eval_steps": 2, "do_eval": True}
    result = luthier.train({**values, **keys, "max_samples": 6})
    for logs in evaluations(result):
        assert {f"eval_{name}" for name in SCORES} | {"eval_loss"} <= set(logs)
    assert {f"eval_{name}" for name in SCORES} <= set(results(values))


def test_scores_of_rows_set_aside_and_of_each_dataset(values):
    luthier.train({**values, **GENERATES, "val_size": 4, "do_eval": True})
    assert {f"eval_{name}" for name in SCORES} <= set(results(values))
    apart = {"eval_dataset": "numbers,tools", "eval_on_each_dataset": True, "do_train": False, "do_eval": True}
    luthier.train({**values, **GENERATES, **apart, "max_samples": 3})
    assert {f"eval_{name}_{score}" for name in ("numbers", "tools") for score in SCORES} <= set(results(values))


def test_an_evaluation_in_the_folder_of_its_training(world, tmp_path):
    """What training wrote stays, the results are added to what the manifest records, and it does not vouch for weights
    that have changed since."""
    out = tmp_path / "out"
    keys = {**world, "output_dir": str(out), "include_num_input_tokens_seen": True, "max_steps": 2, "plot_loss": True}
    luthier.train(keys)
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    log = out / "trainer_log.jsonl"
    trained = log.read_text()
    assert [json.loads(line)["total_tokens"] > 0 for line in trained.splitlines()] == [True] * 3
    alone = {**keys, **EVALUATES, "eval_dataset": "numbers", "dataset": None, "per_device_eval_batch_size": 2}
    luthier.train({**alone, "include_num_input_tokens_seen": False})
    lines = [json.loads(line) for line in log.read_text().removeprefix(trained).splitlines()]
    assert [line["current_steps"] for line in lines] == [5, 10, 12]
    assert {line["total_steps"] for line in lines} == {12} and "eval_loss" in lines[-1]
    assert [line["percentage"] for line in lines] == [41.67, 83.33, 100.0]
    assert verify_folder(out) == []
    of_training, of_both = json.loads(left.pop("all_results.json")), json.loads((out / "all_results.json").read_text())
    assert of_training.items() <= of_both.items() and "eval_loss" in of_both
    changed = {name for name, was in left.items() if (out / name).read_bytes() != was}
    assert changed == {"trainer_log.jsonl", "manifest.json"}
    added = {path.name for path in out.iterdir()} - {*left, "all_results.json"}
    assert added == {"eval_results.json", "eval_data_report.json"}
    weights = out / "model.safetensors"
    for path in (weights, out / "training_loss.png"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    luthier.train({**alone, "include_num_input_tokens_seen": False})
    assert {finding.partition(":")[0] for finding in verify_folder(out)} == {weights.name, "training_loss.png"}


def steps_logged(values: dict[str, Any]) -> list[tuple[int, int]]:
    log = Path(values["output_dir"], "trainer_log.jsonl").read_text(encoding="utf-8")
    return [(line["current_steps"], line["total_steps"]) for line in map(json.loads, log.splitlines())]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_prediction_alone_logs_how_far_it_is(values, num_beams):
    """Beam search generates in batches of a fixed size, all others in one batch in which rows come and go."""
    keys = {**values, **GENERATES, "do_train": False, "do_predict": True, "eval_dataset": "numbers", "dataset": None}
    luthier.train({**keys, "max_samples": 12, "eval_num_beams": num_beams, "per_device_eval_batch_size": 5})
    assert steps_logged(values) == [(5, 12), (10, 12), (12, 12)]
    last = Path(values["output_dir"], "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["predict_rouge-1"] == results(values, "predict")["predict_rouge-1"]


def test_an_evaluation_that_generates_logs_how_far_it_is(values):
    keys = {**values, **GENERATES, "do_train": False, "do_eval": True, "eval_dataset": "numbers", "dataset": None}
    luthier.train({**keys, "max_samples": 12, "per_device_eval_batch_size": 2})
    assert steps_logged(values) == [(5, 6), (5, 12), (10, 12), (12, 12)]  # batches, then answers


def test_scores_of_a_reward_model_log_how_far_they_are(values, tmp_path):
    keys = {**values, "stage": "rm", "finetuning_type": "lora", "dataset": "pairs", "max_steps": 1}
    luthier.train({**keys, "output_dir": str(tmp_path / "trained")})
    alone = {"do_train": False, "do_predict": True, "eval_dataset": "pairs", "dataset": None}
    luthier.train({**keys, **alone, "adapter_name_or_path": str(tmp_path / "trained"), "per_device_eval_batch_size": 2})
    assert steps_logged(values) == [(5, 8), (5, 8), (8, 8)]  # scores, then losses
