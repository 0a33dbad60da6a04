"""The gradient of an optimizer step is that of sum(loss) / sum(units) over all its rows, however the step was cut.

Taken through the whole trainer in float64: with plain SGD and learning rate 1, the gradient is what the weights lost.
"""

from typing import Any

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.data.prepare import prepare
from luthier.model.attention import isolate_samples
from luthier.training.arguments import training_arguments
from luthier.training.trainer import StageTrainer
from luthier.workflow.parts import make_parts
from luthier.workflow.text import load_text_side
from tests.matrix import representatives
from tests.small_world import small_world
from tests.tiny import tiny_llama

NUM_ROWS = 8
CUTS = ((8, 1), (2, 4), (1, 8))
STAGE_KEYS = {
    "sft": {"dataset": "tools", "cutoff_len": 300},
    "sft with label smoothing": {"label_smoothing_factor": 0.2},
    "sft with packing": {"packing": True, "cutoff_len": 150},
    "pt": {"stage": "pt", "dataset": "plain", "packing": False},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("world"))


def float64_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")


def step_gradients(values: dict[str, Any], *, concatenates: bool) -> dict[str, torch.Tensor]:
    run = load_train({**values, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0})
    stage, text = STAGES.get(run.stage), load_text_side(run)
    data = prepare(run, stage.rows, text.encoding)
    model = float64_model(values["model_name_or_path"])
    if concatenates:
        isolate_samples(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    args = training_arguments(run, detect())
    padding_reason = None if concatenates else "the test asks for it"
    parts = make_parts(run, stage, model, data, text, args, padding_reason=padding_reason)
    StageTrainer(args, parts).train()
    return {name: before[name] - weight.detach().cpu() for name, weight in model.named_parameters()}


def single_row_gradients(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A loop over single rows with the model's own logits: backward of sum_rows sum_t CE / sum_rows count."""
    run = load_train(values)
    stage, text = STAGES.get(run.stage), load_text_side(run)
    rows = samples(prepare(run, stage.rows, text.encoding).train.select(range(NUM_ROWS)))
    model = float64_model(values["model_name_or_path"])
    smoothing = run.method.label_smoothing_factor
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        (loss / count).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def samples(rows: Any) -> list[dict[str, list[int]]]:
    """The rows themselves, or the conversations that packed rows are made of."""
    found = []
    for row in rows:
        start = 0
        for length in row.get("sample_lengths", [len(row["input_ids"])]):
            part = slice(start, start + length)
            found.append({name: row[name][part] for name in ("input_ids", "labels")})
            start += length
    return found


@pytest.mark.parametrize("name", representatives(STAGE_KEYS, "sft", "sft with packing"))
def test_gradients_do_not_depend_on_the_micro_batches(world, name):
    values = {**world, **STAGE_KEYS[name]}
    by_hand = single_row_gradients(values)
    assert max(gradient.abs().max() for gradient in by_hand.values()) > 1e-3
    for concatenates in (True,) if values.get("packing") and values["stage"] == "sft" else (True, False):
        for batch, accumulation in CUTS:
            cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            gradients = step_gradients({**values, **cut}, concatenates=concatenates)
            for weight_name, expected in by_hand.items():
                difference = (gradients[weight_name] - expected).abs().max()
                assert difference <= 1e-6, f"{weight_name} at {batch}x{accumulation}, concatenated: {concatenates}"


OTHER_LOSSES = {
    "sft dft": {"use_dft_loss": True},
    "sft eaft": {"use_eaft_loss": True, "eaft_alpha": 0.5},
    "sft asft": {"use_asft_loss": True},
    "sft with weights of messages": {"dataset": "weighted"},
    "sft with weights of messages, packed": {"dataset": "weighted", "packing": True, "cutoff_len": 200},
    "gkd": {"stage": "gkd", "gkd_beta": 0.3, "infer_dtype": "float32"},
}
PREFERENCE_KEYS = {
    "dpo": {"dataset": "pairs"},
    "dpo with BCO": {"dataset": "pairs", "pref_bco_weight": 0.5, "pref_ftx": 0.1, "ld_alpha": 0.5},
    "dpo kto_pair": {"dataset": "pairs", "pref_loss": "kto_pair"},
    "dpo orpo": {"dataset": "pairs", "pref_loss": "orpo"},
    "kto": {"dataset": "feedback", "kto_chosen_weight": 1.5, "pref_ftx": 0.1},
}


@pytest.fixture(scope="module")
def another_model(tmp_path_factory) -> str:
    """Not the reference, so that the ratios and their means over a step are not 0."""
    return str(tiny_llama(tmp_path_factory.mktemp("another"), seed=7, max_position_embeddings=1024))


@pytest.mark.parametrize("name", representatives(OTHER_LOSSES, "sft with weights of messages, packed"))
def test_gradients_of_other_losses_do_not_depend_on_the_micro_batches(world, another_model, name):
    values = {**world, **OTHER_LOSSES[name]}
    values |= {"ref_model": another_model, "infer_dtype": "float32"} if "asft" in name else {}
    values |= {"teacher_model": another_model} if name == "gkd" else {}
    assert_independent_of_micro_batches(values, (True,) if values.get("packing") else (False, True))


@pytest.mark.parametrize("name", representatives(PREFERENCE_KEYS, "dpo"))
def test_gradients_of_preferences_do_not_depend_on_the_micro_batches(world, another_model, name):
    """The step of single rows is the measure: what a loss has to know of the whole step, no batch of one row shows."""
    values = {**world, "stage": name.split()[0], **PREFERENCE_KEYS[name]}
    values |= {} if "orpo" in name else {"ref_model": another_model}
    assert_independent_of_micro_batches(values, (False, True))


def assert_independent_of_micro_batches(values: dict[str, Any], layouts: tuple[bool, ...]) -> None:
    expected: dict[str, torch.Tensor] = {}
    for concatenates in layouts:
        for batch, accumulation in CUTS:
            cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            gradients = step_gradients({**values, **cut}, concatenates=concatenates)
            expected = expected or gradients
            assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
            for weight_name, gradient in gradients.items():
                difference = (gradient - expected[weight_name]).abs().max()
                assert difference <= 1e-6, f"{weight_name} at {batch}x{accumulation}, concatenated: {concatenates}"
