"""Six steps give the losses of plain transformers.Trainer over the same ids, for any split into micro-batches."""

from typing import Any

import pytest
import torch

import luthier
from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.data.prepare import prepare
from luthier.workflow.text import load_text_side
from tests.small_world import losses, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("world"))


def plain_trainer_losses(values: dict[str, Any], trains) -> list[float]:
    """transformers.Trainer with its own loss over the rows that luthier prepared."""
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    run = load_train(values)
    text = load_text_side(run)
    rows = prepare(run, STAGES.get(run.stage).rows, text.encoding).train
    model = AutoModelForCausalLM.from_pretrained(values["model_name_or_path"], dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    args = TrainingArguments(
        values["output_dir"],
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, data_collator=DataCollatorForSeq2Seq(text.tokenizer), train_dataset=rows)
    trainer.train()
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


CASES = {
    "sft full": ({}, lambda name: True),
    "sft freeze": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        lambda name: "layers.1." in name,
    ),
    "sft mask_history on tools": ({"dataset": "tools", "mask_history": True, "cutoff_len": 300}, lambda name: True),
    "pt": ({"stage": "pt", "dataset": "plain", "cutoff_len": 64}, lambda name: True),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_those_of_the_plain_trainer(world, name):
    changes, trains = CASES[name]
    values = {**world, **changes}
    ours = losses(luthier.train(values))
    theirs = plain_trainer_losses(values, trains)
    assert len(ours) == 6 and ours[0] != ours[-1]
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_does_not_depend_on_its_micro_batches(world, checkpointing):
    """8x1, 2x4 and 1x8 (batch x accumulation) are the same step; rows differ in their labels."""
    runs = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        values = {
            **world,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 3,
            "disable_gradient_checkpointing": not checkpointing,
        }
        runs.append(losses(luthier.train(values)))
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], abs=1e-5)
