"""Stage dpo: incompatible keys, the reference of a run, the log."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, LuthierError
from luthier.stages._preference_losses import LOSSES
from tests.small_world import PAIRS, losses, small_world
from tests.tiny import tiny_llama

BASE = {"model_name_or_path": "m", "dataset": "d", "do_train": True, "output_dir": "o", "template": "chatml"}
DPO = {**BASE, "stage": "dpo"}
EVAL = {"val_size": 2}


def problems_of(keys: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_train(keys)
    return {problem.key: f"{problem.reason} -> {problem.remedy}" for problem in caught.value.problems}


REFUSED = {
    "smoothing of another loss": ({"dpo_label_smoothing": 0.1, "pref_loss": "ipo"}, "sigmoid, robust and exo_pair"),
    "smoothing above a half": ({"dpo_label_smoothing": 0.6}, "from 0 to 0.5"),
    "robust with a half": ({"dpo_label_smoothing": 0.5, "pref_loss": "robust"}, "below 0.5"),
    "exo_pair without smoothing": ({"pref_loss": "exo_pair"}, "dpo_label_smoothing above 0"),
    "bco without reference": ({"pref_bco_weight": 0.1, "pref_loss": "orpo"}, "has none"),
    "no beta": ({"pref_beta": 0}, "above 0"),
    "negative ftx": ({"pref_ftx": -1.0}, "at least 0"),
    "negative ld_alpha": ({"ld_alpha": -1.0}, "at least 0"),
    "adapters of no reference": ({"ref_model_adapters": "a"}, "set ref_model"),
    "packing": ({"packing": True}, "without padding anyway"),
    "neat_packing": ({"neat_packing": True}, "without padding anyway"),
    "splitting": ({"on_overlong": "split"}, "could not be cut"),
    "prompts": ({"train_on_prompt": True}, "for stage: gkd or stage: sft only"),
    "history": ({"mask_history": True}, "for stage: gkd or stage: sft only"),
    "generation": ({"predict_with_generate": True, **EVAL}, "for stage sft"),
    "streaming": ({"streaming": True, "max_steps": 2}, "are computed before training, which needs all rows"),
    "pissa": ({"finetuning_type": "lora", "pissa_init": True}, "as its reference"),
    "prediction": ({"do_predict": True, **EVAL}, "for stage sft"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_incompatible_keys_are_refused_with_the_reason(name):
    keys, words = REFUSED[name]
    found = problems_of({**DPO, **keys})
    assert set(found) <= {*keys, "pref_loss"} and words in " ".join(found.values())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_chosen(name):
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].reads else 0.0
    run = load_train({**DPO, "pref_loss": name, "dpo_label_smoothing": smoothing})
    assert run.method.pref_loss == name and not run.warnings


WARNED = {
    "lora_dropout": {"finetuning_type": "lora", "lora_dropout": 0.1},
    "module_dropout": {"finetuning_type": "oft", "module_dropout": 0.1},
    "simpo_gamma": {"simpo_gamma": 0.7},
    "ref_model": {"pref_loss": "orpo", "ref_model": "m"},
}


@pytest.mark.parametrize("key", WARNED)
def test_a_key_without_effect_is_a_warning(key):
    (warning,) = load_train({**DPO, **WARNED[key]}).warnings
    assert warning.key in (key, "lora_dropout") and warning.remedy


def test_an_evaluation_without_a_reference_is_a_warning():
    keys = {**DPO, "do_train": False, "do_eval": True, **EVAL}
    assert [w.key for w in load_train(keys).warnings] == ["ref_model"]
    assert not load_train({**keys, "ref_model": "r"}).warnings
    assert not load_train({**keys, "pref_loss": "simpo"}).warnings


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"), attention_dropout=0.1)
    return {**values, "stage": "dpo", "dataset": "pairs", "learning_rate": 1e-3, "max_steps": 2}


def run(world: dict[str, Any], folder: Path, **keys: Any) -> Any:
    return luthier.train({**world, "output_dir": str(folder), **keys})


def first_rewards(result: Any) -> list[float]:
    first = next(logs for logs in result.log_history if "loss" in logs)
    return [first[f"rewards/{side}"] for side in ("chosen", "rejected")]


@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"bf16": True, "finetuning_type": "lora", "learning_rate": 1e-2}])
def test_the_reference_is_the_model_at_the_start_of_training(world, tmp_path, keys):
    """So the first margin is exactly 0, whatever dropout the model has and what it computes in; its loss is ln 2."""
    result = run(world, tmp_path / "out", **keys)
    assert first_rewards(result) == [0.0, 0.0]
    assert losses(result)[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses(result)[1] < 0.69


def test_a_continued_adapter_is_compared_with_the_sft_model_and_not_with_the_base(world, tmp_path):
    """The reference in numbers: rewards of a named base are beta (log p_sft - log p_base) before the first step."""
    sft = {"stage": "sft", "dataset": "numbers", "learning_rate": 1e-2, "max_steps": 4, "finetuning_type": "lora"}
    luthier.train({**world, **sft, "output_dir": str(tmp_path / "sft")})
    keys = {"finetuning_type": "lora", "adapter_name_or_path": str(tmp_path / "sft"), "max_steps": 1}
    assert first_rewards(run(world, tmp_path / "a", **keys)) == [0.0, 0.0]
    base = world["model_name_or_path"]
    against_base = run(world, tmp_path / "b", **keys, ref_model=base)
    same = run(world, tmp_path / "c", **keys, ref_model=base, ref_model_adapters=str(tmp_path / "sft"))
    assert max(map(abs, first_rewards(against_base))) > 1e-2
    assert first_rewards(same) == pytest.approx([0.0, 0.0], abs=1e-5)
    expected = []
    models = [adapted(base, tmp_path / "sft"), adapted(base, None)]
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            sft_logps, base_logps = ([answer_logp(model, row, side) for row in PAIRS[:4]] for model in models)
        expected.append(0.1 * sum(a - b for a, b in zip(sft_logps, base_logps, strict=True)) / 4)
    assert first_rewards(against_base) == pytest.approx(expected, abs=1e-4)


def adapted(base: str, adapter: Path | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


def answer_logp(model: Any, row: dict[str, str], side: str) -> float:
    """Plain transformers: log p of the answer and its end after the prompt in chatml."""
    from tests.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    prompt, answer = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (
            f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n",
            f"{row[side]}<|im_end|>\n",
        )
    )
    logps = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(logps[place, token].item() for place, token in zip(places, answer, strict=True))


def test_a_resumed_run_keeps_the_reference_of_its_start(world, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
    whole = run(world, tmp_path / "whole", **keys, max_steps=4)
    point = str(tmp_path / "whole" / "checkpoint-2")
    more = run(world, tmp_path / "more", **keys, max_steps=4, resume_from_checkpoint=point)
    assert losses(more) == losses(whole)
    last = [logs["rewards/margins"] for logs in more.log_history if "loss" in logs]
    assert last[2] > 0, "compared with the model of the third step it would be 0"


def test_the_reference_is_computed_once_for_the_same_rows_and_weights(world, tmp_path, capsys):
    keys = {"learning_rate": 2e-3, "dataset": "pairs", "max_samples": 9}
    run(world, tmp_path / "a", **keys)
    assert "reference: computing the log-probabilities of 9 rows" in capsys.readouterr().err
    run(world, tmp_path / "b", **keys)
    assert "reference: computing" not in capsys.readouterr().err
    other = tiny_llama(tmp_path / "other", seed=5, max_position_embeddings=1024)
    run(world, tmp_path / "c", **keys, ref_model=str(other))
    assert "reference: computing" in capsys.readouterr().err


def test_the_log_has_the_metrics_of_the_contract(world, tmp_path):
    result = run(
        world, tmp_path / "out", pref_loss="orpo", val_size=4, eval_strategy="steps", eval_steps=2, do_eval=True
    )
    sides = [f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
    wanted = {*sides, "rewards/accuracies", "rewards/margins", "sft_loss", "odds_ratio_loss"}
    first = next(logs for logs in result.log_history if "loss" in logs)
    assert wanted <= set(first)
    assert {f"eval_{name}" for name in wanted} <= set(json.loads((tmp_path / "out" / "eval_results.json").read_text()))
    line = json.loads((tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()[0])
    assert line["accuracy"] == first["rewards/accuracies"]
    assert first["loss"] == pytest.approx(first["sft_loss"] + 0.1 * first["odds_ratio_loss"], abs=1e-5)


BAD_REFERENCE = {
    "missing": ({"ref_model": "nowhere/at/all"}, "nowhere/at/all"),
    "another vocabulary": ({"ref_model": "small"}, "its embedding has 100 rows, too few"),
}


@pytest.mark.parametrize("name", BAD_REFERENCE)
def test_a_reference_that_does_not_match_is_one_clear_error(world, tmp_path, name):
    keys, words = BAD_REFERENCE[name]
    if keys["ref_model"] == "small":
        keys = {
            "ref_model": str(
                tiny_llama(tmp_path / "small", vocab_size=100, eos_token_id=2, bos_token_id=1, pad_token_id=0)
            )
        }
    with pytest.raises(LuthierError, match=words):
        run(world, tmp_path / "out", **keys)


def dataset(world: dict[str, Any], tmp_path: Path, rows: list[Any]) -> dict[str, Any]:
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"bad": {"file_name": "bad.json", "ranking": True, "columns": columns}}
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return {"dataset": "bad", "dataset_dir": str(tmp_path)}


def test_pairs_without_a_difference_are_dropped_by_row(world, tmp_path):
    rows = [PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}, {**PAIRS[2], "chosen": " "}, PAIRS[3]]
    run(world, tmp_path / "out", **dataset(world, tmp_path, rows), max_steps=1)
    account = json.loads((tmp_path / "out" / "data_report.json").read_text())["datasets"]["bad"]
    assert (account["rows_in"], account["kept"]) == (4, 2)
    assert account["dropped"] == {
        "the chosen and the rejected answer are the same": 1,
        "the chosen answer is empty": 1,
    }
    assert "row 2" in account["dropped_rows"]["the chosen and the rejected answer are the same"][0]


def test_data_without_pairs_is_refused_and_pairs_are_for_their_stages_only(world, tmp_path):
    with pytest.raises(LuthierError, match="the row is a Dialogue, and this stage takes Preference"):
        run(world, tmp_path / "a", dataset="numbers")
    with pytest.raises(LuthierError, match="the row is a Preference, and this stage takes Dialogue"):
        run(world, tmp_path / "b", stage="sft")
