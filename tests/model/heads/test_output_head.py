"""The loss at labeled positions equals the textbook one, value and gradients, however the logits are cut."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.data.shared_prefixes import concatenate_sharing_prefixes
from luthier.model.attention import isolate_samples
from luthier.model.heads.output_head import (
    OutputHead,
    hidden_at,
    hidden_instead_of_logits,
    inspect_head,
    summed_loss,
    token_logps,
)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import TINY_LLAMA

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})).double()


ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]},
    {"input_ids": [9, 8, 7], "labels": [9, 8, 7]},
    {"input_ids": [6, 6, 6, 6, 6, 6, 6], "labels": [-100, 6, -100, 6, -100, -100, 6]},
]


def expected_loss(model, rows):
    """Every row alone through the model's own loss code: logits of all positions, labels shifted by one."""
    total = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum", ignore_index=-100)
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_padded_rows_give_the_loss_of_each_row_alone(tied):
    model = llama(tie_word_embeddings=tied)
    head = inspect_head(model)
    assert head.linear is model.lm_head
    batch = pad_rows(ROWS, pad_token_id=0)
    loss, _ = summed_loss(model, head, model_inputs(batch), batch["positions"], batch["targets"])
    expected = expected_loss(model, ROWS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_full_logits_give_the_same_loss_when_the_head_is_not_plain():
    model = llama()
    batch = pad_rows(ROWS, pad_token_id=0)
    for head in (OutputHead(None, True), OutputHead(None, False)):
        loss, _ = summed_loss(model, head, model_inputs(batch), batch["positions"], batch["targets"])
        torch.testing.assert_close(loss, expected_loss(model, ROWS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("layout", [concatenate_rows, concatenate_sharing_prefixes, partial(pad_rows, pad_token_id=0)])
def test_each_target_has_the_weight_of_its_own_token(layout, is_linear):
    """Of three rows with one beginning; one has no weights, and the first label of a row is none."""
    begin = list(range(20, 30))
    rows = [
        {"input_ids": [*begin, 1, 2], "labels": [20, *[-100] * 9, 1, 2], "weights": [9.0, *[7.0] * 9, 0.5, 0.25]},
        {"input_ids": [*begin, 1, 3], "labels": [*[-100] * 10, 1, 3]},
        {"input_ids": [*begin, 4], "labels": [*[-100] * 9, 29, 4], "weights": [*[5.0] * 9, 0.0, 3.0]},
    ]
    model, expected = llama(), 0.0
    for row, weights in zip(rows, ([0.5, 0.25], [1.0, 1.0], [0.0, 3.0]), strict=True):
        logps = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        expected -= sum(logps[p, row["input_ids"][p]] * w for p, w in zip((-2, -1), weights, strict=True))
    if layout in (concatenate_rows, concatenate_sharing_prefixes):
        isolate_samples(model)
    batch = layout(rows)
    assert ("prefixes" in batch) == (layout is concatenate_sharing_prefixes)
    head = inspect_head(model) if is_linear else OutputHead(None, True)
    where = model_inputs(batch), batch["positions"], batch["targets"]
    found, _ = summed_loss(model, head, *where, weights=batch["weights"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_linear", [True, False])
def test_log_probabilities_and_mean_logits_of_a_head_with_a_bias(is_linear):
    model = llama()
    model.lm_head = torch.nn.Linear(64, 320).double()
    torch.nn.init.normal_(model.lm_head.bias, mean=0.5)
    head, batch = inspect_head(model) if is_linear else OutputHead(None, True), pad_rows(ROWS, pad_token_id=0)
    assert (head.linear is model.lm_head) == is_linear
    where = model_inputs(batch), batch["positions"], batch["targets"]
    logps, means = token_logps(model, head, *where, temperature=0.7)
    logits = model(**where[0]).logits.flatten(0, 1)[batch["positions"]]
    expected = (logits / 0.7).log_softmax(-1).gather(-1, batch["targets"][:, None]).squeeze(-1)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(means.double(), logits.mean(-1), rtol=1e-5, atol=1e-5)
    assert not means.requires_grad


def test_logits_of_16_bits_are_compared_in_32():
    model, batch = llama().bfloat16(), pad_rows(ROWS, pad_token_id=0)
    where = model_inputs(batch), batch["positions"], batch["targets"]
    logits = model(**where[0]).logits.flatten(0, 1)[batch["positions"]].float()
    loss, _ = summed_loss(model, OutputHead(None, True), *where)
    logps, means = token_logps(model, OutputHead(None, True), *where)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["targets"], reduction="sum"), rtol=1e-6, atol=0)
    torch.testing.assert_close(logps.sum(), -loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(means, logits.mean(-1), rtol=1e-5, atol=1e-6)


def test_code_of_its_own_comes_back_to_the_head():
    linear = torch.nn.Linear(2, 2)
    with hidden_instead_of_logits(linear):
        assert torch.equal(linear(torch.ones(2)), torch.ones(2))
    assert "forward" not in vars(linear)
    linear.forward = own = lambda x: 2 * x
    with hidden_instead_of_logits(linear):
        pass
    assert vars(linear)["forward"] is own


def test_a_head_behind_which_more_happens_is_not_taken_for_a_plain_one():
    """Gemma 2 caps its logits with tanh after the head; Cohere scales them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0,
    )  # fmt: skip
    assert inspect_head(Gemma2ForCausalLM(config)).linear is None


def test_a_batch_without_labels_has_loss_zero_and_a_gradient_of_zero():
    model = llama()
    batch = pad_rows([{"input_ids": [1, 2], "labels": [-100, -100]}], pad_token_id=0)
    loss, best = summed_loss(model, inspect_head(model), model_inputs(batch), batch["positions"], batch["targets"])
    assert loss.item() == 0 and best.numel() == 0
    loss.backward()
    assert not model.lm_head.weight.grad.any()


def test_the_layout_of_concatenated_rows():
    batch = concatenate_rows(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 8, 7, 6, 6, 6, 6, 6, 6, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 15]
    assert batch["max_length_k"] == 7
    # Position p predicts the label of p + 1; the first label of a row (9 of the second) is predicted by nothing.
    assert batch["positions"].tolist() == [1, 2, 3, 5, 6, 8, 10, 13]
    assert batch["targets"].tolist() == [3, 4, 5, 8, 7, 6, 6, 6]
    assert batch["target_rows"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_padding_is_a_multiple_of_eight_and_masked():
    batch = pad_rows(ROWS, pad_token_id=0)
    assert batch["input_ids"].shape == (3, 8)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 7]
    left = pad_rows(ROWS, pad_token_id=0, side="left")
    assert left["input_ids"][1].tolist() == [0, 0, 0, 0, 0, 9, 8, 7]


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_bf16_run_has_the_logits_of_plain_autocast(weights):
    """accelerate turns what a model returns into float32; the head computes in bfloat16 all the same."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model = llama().to(getattr(torch, weights))
    head = inspect_head(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    batch = pad_rows(ROWS, pad_token_id=0)
    hidden = hidden_at(prepared, head, model_inputs(batch), batch["positions"])
    assert hidden.dtype == torch.bfloat16
    expected = expected_loss(prepared, ROWS)
    loss, _ = summed_loss(prepared, head, model_inputs(batch), batch["positions"], batch["targets"])
    logps, _ = token_logps(prepared, head, model_inputs(batch), batch["positions"], batch["targets"])
    assert expected.dtype == loss.dtype == logps.dtype == torch.float32
    # Sums in another order round to another logit now and then, on processors without bfloat16 instructions.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(-logps.sum(), expected, rtol=1e-4, atol=0)
