"""Reward modeling: the loss by hand, the score at the last token, and what a run leaves for other programs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.cli import main
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, ModelError
from luthier.data.collate import collate, concatenate_rows, pad_rows
from luthier.model.attention import isolate_samples
from luthier.model.classes import make_scorer
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages.rm import RmConfig, loss, predict
from tests.matrix import representatives
from tests.small_world import losses, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    return {**values, "stage": "rm", "dataset": "pairs", "max_steps": 4, "lora_rank": 4}


@pytest.fixture(scope="module")
def scorer(llama_folder) -> Any:
    """A tiny reward model with a score layer that is no noise only."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(llama_folder)
    make_scorer(config)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(llama_folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_()
    return model.eval()


ROWS = [
    {
        "chosen_input_ids": [5, 6, 7, 8],
        "chosen_labels": [-100, -100, 7, 8],
        "rejected_input_ids": [5, 6, 9],
        "rejected_labels": [-100, -100, 9],
    },
    {
        "chosen_input_ids": [20, 21, 256],
        "chosen_labels": [-100, 21, 256],
        "rejected_input_ids": [20, 30, 31, 32, 33],
        "rejected_labels": [-100, 30, 31, 32, 33],
    },
]
"""One answer ends with the padding token: what counts is where a sequence ends, not what stands there."""


def score_alone(model: Any, ids: list[int]) -> float:
    """By plain transformers: the backbone, and the score layer on its last hidden state."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


@pytest.mark.parametrize("side", ["right", "left", "concatenated"])
def test_the_loss_is_the_sum_over_pairs_of_the_negative_log_sigmoid_of_the_margin(scorer, side):
    def layout(rows):
        return concatenate_rows(rows) if side == "concatenated" else pad_rows(rows, 256, side=side)

    chosen = [score_alone(scorer, row["chosen_input_ids"]) for row in ROWS]
    rejected = [score_alone(scorer, row["rejected_input_ids"]) for row in ROWS]
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    used = scorer.config._attn_implementation
    if side == "concatenated":
        isolate_samples(scorer)
    models, batch = Models(scorer, inspect_head(scorer)), collate(ROWS, layout)
    with torch.no_grad():
        output = loss(models, batch, RmConfig(), state={}, training=True)
        lines = predict(models, batch, RmConfig())
    scorer.set_attn_implementation(used)
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins)
    assert output.total.item() == pytest.approx(expected, abs=1e-5)
    means = {name: total.item() / count for name, (total, count) in output.metrics.items()}
    assert means["accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert means["rewards/chosen"] == pytest.approx(sum(chosen) / 2, abs=1e-5)
    assert means["rewards/rejected"] == pytest.approx(sum(rejected) / 2, abs=1e-5)
    assert means["rewards/margins"] == pytest.approx(sum(margins) / 2, abs=1e-5)
    assert lines == [
        {"chosen": pytest.approx(c, abs=0.006), "rejected": pytest.approx(r, abs=0.006)}
        for c, r in zip(chosen, rejected, strict=True)
    ]


def test_filler_pairs_have_no_weight(scorer):
    """Those that complete the last batch of an evaluation: any row, without labels."""
    unlabeled = {name: [-100] * len(value) if "labels" in name else value for name, value in ROWS[1].items()}
    models = Models(scorer, inspect_head(scorer))
    plain, filled = (collate(rows, lambda rows: pad_rows(rows, 256)) for rows in (ROWS[:1], [ROWS[0], unlabeled]))
    expected, found = (loss(models, batch, RmConfig(), state={}, training=False) for batch in (plain, filled))
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    for name, (total, count) in expected.metrics.items():
        assert float(found.metrics[name][0]) == pytest.approx(float(total), rel=1e-5), name
        assert found.metrics[name][1] == count == 1


def test_the_loss_by_hand():
    """r_w = 1, r_l = 0 and r_w = 0, r_l = 2: log(1 + e^-1) + log(1 + e^2) = 0.313262 + 2.126928 = 2.440190."""
    values = torch.tensor([1.0, 0.0, 0.0, 2.0])

    class Scorer(torch.nn.Module):
        def forward(self, input_ids, **options):
            self.score(values.view(1, 4, 1))

    from luthier.model.heads.output_head import OutputHead

    model = Scorer()
    model.score = torch.nn.Identity()
    batch = {"input_ids": torch.zeros(1, 4), "ends": torch.arange(4), "target_rows": torch.arange(4)}
    models = Models(model, OutputHead(None, takes_positions=False, score=model.score))
    output = loss(models, batch, RmConfig(), state={}, training=True)
    assert output.total.item() == pytest.approx(2.440190, abs=1e-6)
    assert output.metrics["accuracy"][0].item() == 1


def run_of(kind: str) -> dict[str, Any]:
    return {
        "full": {"finetuning_type": "full"},
        "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        "lora": {"finetuning_type": "lora", "lora_dropout": 0.1},
        "oft": {"finetuning_type": "oft", "oft_block_size": 16},
    }[kind]


def plain_scores(values: dict[str, Any], folder: Path, texts: list[list[int]]) -> list[float]:
    """Through plain transformers and peft, nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = folder if (folder / "model.safetensors").is_file() else values["model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    if (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([text])).logits.item() for text in texts]


@pytest.mark.parametrize("kind", representatives(["full", "freeze", "lora", "oft"], "full", "lora"))
def test_what_is_saved_scores_the_same_in_plain_libraries_and_after_export(values, tmp_path, kind):
    keys = {**values, **run_of(kind), "val_size": 0.25, "do_eval": True, "do_predict": True}
    result = luthier.train(keys)
    out = Path(values["output_dir"])
    assert losses(result)[-1] < losses(result)[0]
    lines = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and set(lines[0]) == {"chosen", "rejected"}
    evaluation = result.metrics["eval"]
    assert result.metrics["predict"]["predict_accuracy"] == evaluation["eval_accuracy"]
    right = sum(line["chosen"] > line["rejected"] for line in lines)
    assert right / 4 <= evaluation["eval_accuracy"] + 1e-9

    texts = [[72, 101, 108], list(range(60, 90))]
    scores = plain_scores(values, out, texts)
    assert scores[0] != scores[1]
    head = load_file(out / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "v_head.summary.weight": (1, 64),
        "v_head.summary.bias": (1,),
    }
    source = {"model_name_or_path": str(out)}
    if kind in ("lora", "oft"):
        source = {"adapter_name_or_path": str(out), "finetuning_type": kind}
    words = {"model_name_or_path": values["model_name_or_path"], "template": "chatml", **source}
    folder = luthier.export({**words, "export_dir": str(tmp_path / "merged")})
    assert plain_scores(values, folder, texts) == pytest.approx(scores, abs=1e-5)
    torch.testing.assert_close(load_file(folder / "value_head.safetensors"), head)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]

    with pytest.raises(ModelError, match="this is a reward model: it scores a text and generates none"):
        luthier.chat(words)
    again = {**values, **words, "do_train": False, "do_predict": True, "eval_dataset": "pairs", "dataset": None}
    again |= {"output_dir": str(tmp_path / "again")}
    if kind in ("full", "lora"):
        metrics = luthier.train(again).metrics["predict"]
        assert 0 <= metrics["predict_accuracy"] <= 1 and "predict_rewards/margins" in metrics


def test_the_score_layer_is_trained_by_every_method_and_gets_no_adapter(values):
    luthier.train({**values, "finetuning_type": "lora"})
    saved = load_file(Path(values["output_dir"], "adapter_model.safetensors"))
    assert "base_model.model.score.weight" in saved and not any("score.lora" in name for name in saved)
    config = json.loads(Path(values["output_dir"], "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and set(config["modules_to_save"]) == {"classifier", "score"}
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }


def test_a_step_does_not_depend_on_its_micro_batches(values):
    def run(batch: int, accumulation: int) -> list[float]:
        keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return losses(luthier.train({**values, **keys, "learning_rate": 1e-3}))

    whole = run(8, 1)
    for batch, accumulation in ((4, 2), (1, 8)):
        assert run(batch, accumulation) == pytest.approx(whole, abs=1e-5)


def test_the_best_model_is_loaded_at_the_end(values):
    keys = {"val_size": 0.25, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    result = luthier.train(
        {**values, **keys, "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "do_eval": True}
    )
    best = max(logs["eval_accuracy"] for logs in result.log_history if "eval_accuracy" in logs)
    assert result.metrics["eval"]["eval_accuracy"] == best


def test_a_language_model_adapter_is_merged_or_refused(values, tmp_path):
    sft = {**values, "stage": "sft", "dataset": "numbers", "finetuning_type": "lora", "max_steps": 1}
    luthier.train({**sft, "output_dir": str(tmp_path / "sft")})
    keys = {**values, "finetuning_type": "lora", "adapter_name_or_path": str(tmp_path / "sft"), "max_steps": 1}
    with pytest.raises(ModelError, match="belongs to a language model without a reward head -> set create_new_adapter"):
        luthier.train(keys)
    luthier.train({**keys, "create_new_adapter": True})
    # And the other way round: nothing is trained to write on a reward model.
    reward = {**sft, "adapter_name_or_path": values["output_dir"], "output_dir": str(tmp_path / "no")}
    with pytest.raises(ModelError, match="this is a reward model"):
        luthier.train(reward)


def test_a_reward_model_is_trained_further(values, tmp_path):
    keys = {**values, "finetuning_type": "lora"}
    first = losses(luthier.train(keys))
    second = luthier.train({**keys, "adapter_name_or_path": values["output_dir"], "output_dir": str(tmp_path / "b")})
    assert losses(second)[0] < first[0]


def test_an_architecture_without_a_reward_head_is_refused(values, tmp_path):
    from transformers import GPT2Config, Olmo2Config

    from tests.tiny import save_tiny

    size = {"vocab_size": 320, "eos_token_id": 260, "pad_token_id": 256, "bos_token_id": 259}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    olmo = save_tiny(tmp_path / "olmo", Olmo2Config(**size, **shape))
    gpt2 = save_tiny(tmp_path / "gpt2", GPT2Config(**size, n_embd=32, n_layer=2, n_head=2, n_positions=700))
    luthier.train({**values, "model_name_or_path": str(gpt2), "finetuning_type": "lora", "max_steps": 1})
    try:
        luthier.train({**values, "model_name_or_path": str(olmo), "output_dir": str(tmp_path / "no")})
    except ModelError as error:
        assert "transformers has no class for a reward model of the type olmo2" in str(error)


def test_only_reward_models_give_scores(values):
    keys = {"do_train": False, "do_eval": True, "eval_dataset": "pairs", "dataset": None}
    with pytest.raises(ModelError, match="this model is a language model without a reward head"):
        luthier.train({**values, **keys})


@pytest.mark.parametrize("key", ["packing", "neat_packing", "predict_with_generate", "on_overlong"])
def test_keys_that_are_incompatible_with_pairs_are_refused(key):
    values = {"model_name_or_path": "m", "dataset": "d", "do_train": True, "output_dir": "o", "stage": "rm"}
    load_train(values)
    with pytest.raises(ConfigError, match=key):
        load_train({**values, key: "split" if key == "on_overlong" else True, "val_size": 0.1})


def test_rows_of_another_kind_are_named(values, capsys):
    assert main(["train", *(f"{key}={value}" for key, value in {**values, "dataset": "numbers"}.items())]) == 2
    assert "numbers: is not ranking data, which stage rm needs" in capsys.readouterr().err
