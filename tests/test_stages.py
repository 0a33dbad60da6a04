"""The stages as values: what a row becomes, what a loss sums over, which keys exclude each other."""

import dataclasses
from typing import Any

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ConfigError, RowError
from luthier.core.kinds import STAGES
from luthier.data.chat.encoder import Encoder
from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import Encoded
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import get_template
from luthier.data.types import Dialogue, Message, Prompt
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages.pt import PtConfig
from luthier.stages.sft import SftConfig

TALK = Dialogue((Message("user", "a"), Message("assistant", "bb"), Message("user", "c"), Message("assistant", "dd")))


@pytest.fixture(scope="module")
def encoding(tokenizer) -> Encoding:
    return Encoding(Encoder(tokenizer), get_template("chatml"), cutoff_len=200)


@pytest.fixture(scope="module")
def model(llama_folder) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


def encoded(stage: str, example: Any, encoding: Encoding, config: Any) -> Encoded:
    """The one row of an example."""
    value = STAGES.get(stage)
    ((written,),) = value.rows.write(example, encoding, value.rows.settings(config))
    (row,) = value.rows.label(turn_ids(encoding.encoder, [written]), encoding, value.rows.settings(config))
    return row


def learned_text(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


@pytest.mark.parametrize(
    ("config", "learned"),
    [
        (SftConfig(), "bb<|im_end|>\ndd<|im_end|>\n"),
        (SftConfig(mask_history=True), "dd<|im_end|>\n"),
        (
            SftConfig(train_on_prompt=True),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nbb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\ndd<|im_end|>\n",
        ),
    ],
    ids=["answers", "last answer", "everything"],
)
def test_sft_learns_the_answers_it_is_told_to(encoding, tokenizer, config, learned):
    row = encoded("sft", TALK, encoding, config)
    assert learned_text(tokenizer, row.labels) == learned
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_pt_learns_every_token_and_the_end_of_the_text(encoding, tokenizer):
    row = encoded("pt", Prompt((Message("user", "plain text"),)), encoding, PtConfig())
    assert tokenizer.decode(row.input_ids) == "plain text</s>" and row.labels == row.input_ids


def test_pt_ends_a_text_for_llama3_as_its_tokenizer_did_in_training(tokenizer):
    llama3 = Encoding(Encoder(tokenizer), get_template("llama3"), cutoff_len=None)
    row = encoded("pt", Prompt((Message("user", "x"),)), llama3, PtConfig())
    assert tokenizer.decode(row.input_ids) == "x<|end_of_text|>"


def test_pt_cannot_use_an_empty_text(encoding):
    with pytest.raises(RowError, match="the text is empty"):
        encoded("pt", Prompt((Message("user", ""),)), encoding, PtConfig())


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [10, 11, 12], "labels": [10, -100, 12]},
    {"input_ids": [20, 21], "labels": [20, 21]},
]
"""3 + 1 + 1 tokens are learned: the first token of a row has none before it."""


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_the_loss_is_a_sum_over_the_labeled_tokens(model, stage, smoothing):
    value = STAGES.get(stage)
    config = {"sft": SftConfig, "pt": PtConfig}[stage](label_smoothing_factor=smoothing)
    batch = pad_rows(ROWS, pad_token_id=256)
    assert value.units(batch) == 5
    models = Models(model, inspect_head(model))
    for training in (True, False):
        expected = sum(
            torch.nn.functional.cross_entropy(
                model(torch.tensor([row["input_ids"]])).logits[0, :-1],
                torch.tensor(row["labels"][1:]),
                reduction="sum",
                label_smoothing=smoothing if training else 0.0,
            ).item()
            for row in ROWS
        )
        found = value.loss(models, batch, config, state={}, training=training)
        assert found.total.item() == pytest.approx(expected, abs=1e-4)
        assert dict(found.metrics) == {}


def test_a_token_counts_with_its_weight_in_the_loss_and_in_the_units(model):
    weighted = [{**row, "weights": [0.5] * len(row["labels"])} for row in ROWS]
    models, stage = Models(model, inspect_head(model)), STAGES.get("sft")
    whole, half = (
        stage.loss(models, pad_rows(rows, pad_token_id=256), SftConfig(), state={}, training=True).total.item()
        for rows in (ROWS, weighted)
    )
    assert half == pytest.approx(whole / 2, rel=1e-5)
    assert stage.units(pad_rows(weighted, pad_token_id=256)) == 2.5


def test_accuracy_is_summed_row_by_row_and_only_in_evaluation(model):
    batch, config = pad_rows(ROWS, pad_token_id=256), SftConfig(compute_accuracy=True)
    models, stage = Models(model, inspect_head(model)), STAGES.get("sft")
    assert dict(stage.loss(models, batch, config, state={}, training=True).metrics) == {}
    total, count = stage.loss(models, batch, config, state={}, training=False).metrics["accuracy"]
    shares = []
    for row in ROWS:
        guesses = model(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
        labels = torch.tensor(row["labels"][1:])
        shares.append((guesses == labels)[labels != -100].float().mean().item())
    assert count == 3 and total.item() == pytest.approx(sum(shares), abs=1e-6)


def test_a_row_in_which_nothing_is_learned_counts_for_nothing(model):
    nothing = {"input_ids": [5, 6], "labels": [-100, -100]}
    stage, models = STAGES.get("sft"), Models(model, inspect_head(model))
    config = SftConfig(compute_accuracy=True)
    alone = pad_rows([nothing], pad_token_id=256)
    assert stage.units(alone) == 0
    output = stage.loss(models, alone, config, state={}, training=False)
    assert output.total.item() == 0 and output.metrics["accuracy"][1] == 0
    both, without = (pad_rows(rows, pad_token_id=256) for rows in ([*ROWS, nothing], ROWS))
    totals = [stage.loss(models, batch, config, state={}, training=False).total.item() for batch in (both, without)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-5)


def test_padded_and_concatenated_batches_name_the_same_targets():
    padded, joined = pad_rows(ROWS, pad_token_id=256), concatenate_rows(ROWS)
    assert padded["targets"].tolist() == joined["targets"].tolist() == [7, 8, 9, 12, 21]
    assert padded["target_rows"].tolist() == joined["target_rows"].tolist() == [0, 0, 0, 1, 2]
    assert joined["positions"].tolist() == [1, 2, 3, 6, 8]
    assert joined["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert joined["cu_seq_lens_q"].tolist() == [0, 5, 8, 10]
    assert padded["input_ids"].shape == (3, 8)
    assert set(model_inputs(padded)) == {"input_ids", "attention_mask"}


REFUSED = {
    "mask_history with train_on_prompt": {"mask_history": True, "train_on_prompt": True},
    "accuracy of written answers": {"compute_accuracy": True, "predict_with_generate": True, "val_size": 0.1},
    "prediction without answers": {"do_predict": True, "val_size": 0.1},
    "packing and no packing": {"neat_packing": True, "packing": False},
    "plain text has no questions": {"stage": "pt", "predict_with_generate": True, "val_size": 0.1},
    "plain text has no answers": {"stage": "pt", "do_predict": True, "val_size": 0.1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name):
    values = {"model_name_or_path": "m", "dataset": "d", "do_train": True, "output_dir": "o", "template": "chatml"}
    load_train(values)
    with pytest.raises(ConfigError):
        load_train({**values, **REFUSED[name]})


@pytest.mark.parametrize("name", STAGES.names)
def test_a_stage_is_named_as_its_file_and_has_a_frozen_config(name):
    stage = STAGES.get(name)
    assert stage.name == name
    for field in dataclasses.fields(stage.config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(stage.config(), field.name, None)
