"""Stage kto: the loss by hand and against TRL, incompatible keys, rows and log."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, LuthierError
from luthier.core.kinds import STAGES
from luthier.data.collate import collate, concatenate_rows, pad_rows
from luthier.data.prepare import prepare
from luthier.model.attention import isolate_samples
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages.kto import KtoConfig, count_rows, loss, margins, sums, update
from luthier.workflow.text import load_text_side
from tests.small_world import FEEDBACK, losses, small_world
from tests.stages import trl_losses

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
ANSWERS = [[20, 21, 22], [23], [24, 25, 26, 27], [28, 29]]
LIKED = [True, False, True, True]
ROWS = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
STRANGERS = [
    {"input_ids": p + a, "labels": [-100] * len(p) + a}
    for p, a in zip(PROMPTS, (ANSWERS[-1], *ANSWERS[:-1]), strict=True)
]


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import TINY_LLAMA

    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, "num_hidden_layers": 1})).double().eval()


def batch_of(reference: torch.Tensor, *, concatenates: bool = False, fillers: Sequence[bool] = ()) -> dict[str, Any]:
    """`fillers`: whether each filler row is a liked one."""
    filler = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    parts = zip(*(own + [filler] * len(fillers) for own in (ROWS, STRANGERS)), [*LIKED, *fillers], strict=True)
    rows = [
        {**row, "kl_input_ids": other["input_ids"], "kl_labels": other["labels"], "kto_tags": [int(liked)]}
        for row, other, liked in parts
    ]
    layout = concatenate_rows if concatenates else lambda rows: pad_rows(rows, pad_token_id=0)
    return {**collate(rows, layout), "reference_logps": reference}


def reference_of(model: Any, shift: float) -> torch.Tensor:
    """What the model says itself, so that a row and a stranger lie `shift` below and above it in turns."""
    with torch.no_grad():
        rows = [trl_losses.said(model, trl_losses.rectangle(part)).log_probs.sum(-1) for part in (ROWS, STRANGERS)]
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -0.5, 1.0], dtype=torch.float64)
    return torch.cat(rows) - shift * signs


def state_of(model: Any, batch: dict[str, Any], config: KtoConfig) -> dict[str, float]:
    found = sums(Models(model, inspect_head(model)), batch, config, state={})
    means = {name: (total.item() / count, count) for name, (total, count) in found.items()}
    return dict(update({}, means, config))


def test_by_hand(model):
    """With beta 1 and ratios ln 3, -ln 3, -ln 3, ln 3 of rows that are liked but for the second, and KL = 0:

    1 - s(ln 3) = 1/4; disliked at -ln 3: 1/4; liked at -ln 3: 3/4; liked at ln 3: 1/4. Weights 2 and 3 give
    2/4 + 3/4 + 6/4 + 2/4 = 13/4. With KL = ln 3: 1/2, 9/10 turned to 1 - s(ln 9) = 1/10, 1 - s(-ln 9) = 9/10, 1/2.
    """
    reference = reference_of(model, math.log(3))
    config = KtoConfig(pref_beta=1.0, kto_chosen_weight=2.0, kto_rejected_weight=3.0)
    models = Models(model, inspect_head(model))
    for kl, expected in ((0.0, 13 / 4), (math.log(3), 2 * (0.5 + 0.9 + 0.5) + 3 * 0.1)):
        found = loss(models, batch_of(reference), config, state={"kl": kl}, training=True)
        assert found.total.item() == pytest.approx(expected, abs=1e-6)


def test_the_kl_is_the_mean_over_the_mismatched_pairs_and_at_least_zero(model):
    """Shifts 1, 1, -1/2, 1 of one unit: 5/8; the other way round it would be negative."""
    for shift, expected in ((1.0, 0.625), (-1.0, 0.0)):
        state = state_of(model, batch_of(reference_of(model, shift)), KtoConfig())
        assert state == pytest.approx({"kl": expected}, abs=1e-9)


@pytest.mark.parametrize("concatenates", [False, True], ids=["padded", "concatenated"])
@pytest.mark.parametrize("shift", [0.7, -0.7], ids=["divergence above 0", "divergence below 0"])
def test_the_stage_equals_trl(model, shift, concatenates):
    pytest.importorskip("trl", reason="trl is the independent implementation")
    config = KtoConfig(pref_beta=0.3, kto_chosen_weight=1.5, kto_rejected_weight=0.8)
    reference = reference_of(model, shift)
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    expected, metrics = trl_losses.kto_loss(model, ROWS, STRANGERS, LIKED, reference, **settings)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    if concatenates:
        isolate_samples(model)
    batch = batch_of(reference, concatenates=concatenates)
    state = state_of(model, batch, config)
    assert state["kl"] == pytest.approx(metrics["kl"][0], abs=1e-6)
    found = loss(Models(model, inspect_head(model)), batch, config, state=state, training=True)
    assert count_rows(batch) == len(ROWS)
    torch.testing.assert_close(found.total / len(ROWS), expected, rtol=0, atol=1e-6)
    for mine, gradient in zip(
        torch.autograd.grad(found.total / len(ROWS), list(model.parameters())), theirs, strict=True
    ):
        torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-6)
    means = {name: float(total) / count for name, (total, count) in found.metrics.items()}
    means |= margins(means)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"):
        assert means[name] == pytest.approx(metrics[name][0], abs=1e-6), name


@pytest.mark.parametrize("fillers", [[True], [False], [True, False]], ids=["liked", "disliked", "both"])
def test_filler_rows_have_no_weight(model, fillers):
    reference, models = reference_of(model, 0.7), Models(model, inspect_head(model))
    nothing = torch.zeros(len(fillers), dtype=torch.float64)
    filled = torch.cat([reference[: len(ROWS)], nothing, reference[len(ROWS) :], nothing])
    config, batches = KtoConfig(pref_ftx=0.1), (batch_of(reference), batch_of(filled, fillers=fillers))
    assert [count_rows(batch) for batch in batches] == [len(ROWS)] * 2
    states = [state_of(model, batch, config) for batch in batches]
    assert states[1]["kl"] == pytest.approx(states[0]["kl"])
    expected, found = (loss(models, batch, config, state={"kl": 0.4}, training=True) for batch in batches)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-9)
    for name, (total, count) in expected.metrics.items():
        assert float(found.metrics[name][0]) == pytest.approx(float(total), abs=1e-9), name
        assert found.metrics[name][1] == count, name


def test_the_sft_loss_is_added_to_liked_answers(model):
    batch, models = batch_of(reference_of(model, 1.0)), Models(model, inspect_head(model))
    plain, more = (
        loss(models, batch, KtoConfig(pref_ftx=ftx), state={"kl": 0.0}, training=True).total for ftx in (0.0, 0.4)
    )
    logps = trl_losses.said(model, trl_losses.rectangle(ROWS)).log_probs.sum(-1).tolist()
    expected = sum(-logp / len(a) for logp, a, liked in zip(logps, ANSWERS, LIKED, strict=True) if liked)
    assert (more - plain).item() == pytest.approx(0.4 * expected, abs=1e-6)


def test_margins_need_answers_of_both_kinds():
    assert margins({"rewards/chosen": 0.5, "rewards/rejected": -0.25}) == {"rewards/margins": 0.75}
    assert margins({"rewards/chosen": 0.5}) == {}


BASE = {"model_name_or_path": "m", "dataset": "d", "do_train": True, "output_dir": "o", "template": "chatml"}
KTO = {**BASE, "stage": "kto"}
REFUSED = {
    "no beta": ({"pref_beta": 0}, "above 0"),
    "negative ftx": ({"pref_ftx": -1.0}, "at least 0"),
    "negative weight": ({"kto_chosen_weight": -1.0}, "at least 0"),
    "negative other weight": ({"kto_rejected_weight": -1.0}, "at least 0"),
    "adapters of no reference": ({"ref_model_adapters": "a"}, "set ref_model"),
    "packing": ({"packing": True}, "without padding anyway"),
    "neat_packing": ({"neat_packing": True}, "without padding anyway"),
    "splitting": ({"on_overlong": "split"}, "the whole answer"),
    "prompts": ({"train_on_prompt": True}, "for stage: gkd or stage: sft only"),
    "history": ({"mask_history": True}, "for stage: gkd or stage: sft only"),
    "generation": ({"predict_with_generate": True, "val_size": 2}, "for stage sft"),
    "prediction": ({"do_predict": True, "val_size": 2}, "for stage sft"),
    "streaming": ({"streaming": True, "max_steps": 2}, "are computed before training, which needs all rows"),
    "pissa": ({"finetuning_type": "lora", "pissa_init": True}, "as its reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_incompatible_keys_are_refused_with_the_reason(name):
    keys, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load_train({**KTO, **keys})
    assert {problem.key for problem in caught.value.problems} <= set(keys)
    assert words in str(caught.value)


def test_dropout_without_effect_is_a_warning():
    (warning,) = load_train({**KTO, "finetuning_type": "lora", "lora_dropout": 0.1}).warnings
    assert warning.key == "lora_dropout" and "without dropout" in warning.reason


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"), attention_dropout=0.1)
    return {**values, "stage": "kto", "dataset": "feedback", "learning_rate": 1e-3, "max_steps": 3}


def run(world: dict[str, Any], folder: Path, **keys: Any) -> Any:
    return luthier.train({**world, "output_dir": str(folder), **keys})


def test_the_first_step_is_a_half_and_the_log_has_the_metrics_of_the_contract(world, tmp_path):
    """All ratios are 0, since the reference is the model itself: 1 - s(0)."""
    result = run(world, tmp_path / "out", val_size=4, eval_strategy="steps", eval_steps=3, do_eval=True)
    assert losses(result)[0] == 0.5 and losses(result)[-1] < 0.5
    steps = [logs for logs in result.log_history if "loss" in logs]
    sides = [f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
    wanted = {*sides, "rewards/margins", "kl"}
    assert all(wanted <= set(logs) and "rewards/accuracies" not in logs for logs in steps)
    assert steps[0]["kl"] == 0 and steps[-1]["rewards/margins"] > 0
    assert {f"eval_{name}" for name in wanted} <= set(json.loads((tmp_path / "out" / "eval_results.json").read_text()))


def test_an_evaluation_does_not_depend_on_its_batches(world, tmp_path):
    keys = {"val_size": 7, "do_eval": True}
    results = [run(world, tmp_path / str(size), per_device_eval_batch_size=size, **keys) for size in (1, 3, 8)]
    first, *others = [
        {k: v for k, v in r.metrics["eval"].items() if k.count("_") == 1 and k != "eval_runtime"} for r in results
    ]
    assert "eval_kl" in first
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)


def rows_of(values: dict[str, Any]) -> tuple[Any, Any]:
    asked = load_train(values)
    data = prepare(asked, STAGES.get(asked.stage).rows, load_text_side(asked).encoding)
    return data.train, data.ledger.accounts


def test_rows_have_the_columns_of_the_contract(world):
    rows, _ = rows_of(world)
    assert rows.column_names == ["input_ids", "labels", "kl_input_ids", "kl_labels", "kto_tags"]
    assert [tag for (tag,) in rows["kto_tags"]] == [int(row["good"]) for row in FEEDBACK]


@pytest.mark.parametrize("rule", ["truncate", "drop"])
def test_the_ledger_adds_up(world, rule):
    rows, accounts = rows_of({**world, "cutoff_len": 53, "on_overlong": rule})
    account = accounts["feedback"]
    assert account.rows_in == len(FEEDBACK) == account.kept + account.num_dropped
    assert len(rows) == account.kept
    assert account.tokens == sum(map(len, rows["input_ids"]))
    assert account.labeled_tokens == sum(label != -100 for labels in rows["labels"] for label in labels)
    assert (account.truncated > 0) == (rule == "truncate") and (account.num_dropped > 0) == (rule == "drop")
    whole = rows_of(world)[1]["feedback"]
    if rule == "truncate":
        assert account.tokens + account.lost_tokens == whole.tokens
        assert account.labeled_tokens + account.lost_labeled_tokens == whole.labeled_tokens


def dataset(tmp_path: Path, rows: list[Any]) -> dict[str, Any]:
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    info = {
        "bad": {"file_name": "bad.json", "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}}
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return {"dataset": "bad", "dataset_dir": str(tmp_path)}


def test_an_overlong_row_stops_the_run_with_on_overlong_error(world, tmp_path):
    with pytest.raises(LuthierError, match=r"row 6: 55 tokens, but cutoff_len is 53"):
        run(world, tmp_path, cutoff_len=53, on_overlong="error")


def test_liked_answers_without_a_word_are_dropped_by_row(world, tmp_path):
    rows = [FEEDBACK[0], {**FEEDBACK[1], "output": " "}, {**FEEDBACK[2], "output": ""}, FEEDBACK[5]]
    run(world, tmp_path / "out", **dataset(tmp_path, rows), max_steps=1)
    account = json.loads((tmp_path / "out" / "data_report.json").read_text())["datasets"]["bad"]
    assert account["dropped"] == {"the liked answer is empty": 1} and account["kept"] == 3
    assert "row 2" in account["dropped_rows"]["the liked answer is empty"][0]


def test_rows_of_one_prompt_are_refused(world, tmp_path):
    rows = [{**row, "instruction": "Again."} for row in FEEDBACK]
    with pytest.raises(LuthierError, match="all 16 rows have the same prompt"):
        run(world, tmp_path / "out", **dataset(tmp_path, rows))


def test_rows_without_a_kto_tag_are_refused_and_rows_with_one_are_for_kto_only(world, tmp_path):
    with pytest.raises(LuthierError, match="the row is a Dialogue, and this stage takes Feedback"):
        run(world, tmp_path / "a", dataset="numbers")
    with pytest.raises(LuthierError, match="the row is a Feedback, and this stage takes Preference"):
        run(world, tmp_path / "b", stage="dpo")


def test_rows_dropped_before_are_told_with_the_refusal(world, tmp_path):
    rows = [FEEDBACK[0], {**FEEDBACK[3], "good": "maybe"}]
    with pytest.raises(LuthierError, match=r"the same prompt[^\n]*\n  bad: 1 dropped: column 'good' is [^\n]*row 2"):
        run(world, tmp_path / "out", **dataset(tmp_path, rows), max_steps=1)
