"""The loss at labelled positions equals the textbook one, value and gradients, however the logits are cut."""

import pytest
import torch
import torch.nn.functional as F

from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.model.heads.output_head import OutputHead, inspect_head, summed_loss
from luthier.model.kernels import chunked_head
from luthier.model.kernels.chunked_head import linear_cross_entropy


def test_two_words_by_hand():
    """One position, logits (0, ln 3): p = (1/4, 3/4), so the loss of target 1 is -ln(3/4) and of target 0 is ln 4."""
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]], dtype=torch.float64)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    for target, expected in ((1, 4 / 3), (0, 4.0)):
        loss, best = linear_cross_entropy(hidden, weight, None, torch.tensor([target]))
        assert loss.item() == pytest.approx(torch.tensor(expected).log().item(), abs=1e-7)
        assert best.tolist() == [1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 2**26])
def test_value_and_gradients_equal_torch(monkeypatch, smoothing, with_bias, chunk_elements):
    monkeypatch.setattr(chunked_head, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(150, 8).double(), torch.randn(11, 8).double(), torch.randn(11).double()
    targets = torch.randint(0, 11, (150,))
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss, best = linear_cross_entropy(ours[0], ours[1], ours[2] if with_bias else None, targets, smoothing)
    logits = F.linear(theirs[0], theirs[1], theirs[2] if with_bias else None)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    assert torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (3 * loss).backward()
    (3 * expected).backward()
    for mine, reference in zip(ours[: 2 + with_bias], theirs, strict=False):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 2**26])
def test_log_probabilities_and_gradients_equal_log_softmax(monkeypatch, temperature, with_bias, chunk_elements):
    """150 positions are three chunks of 64, or one; every position has a weight of its own in the sum."""
    monkeypatch.setattr(chunked_head, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(150, 8).double(), torch.randn(11, 8).double(), torch.randn(11).double()
    targets, shares = torch.randint(0, 11, (150,)), torch.randn(150).double()
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    found = chunked_head.linear_logps(ours[0], ours[1], ours[2] if with_bias else None, targets, temperature)
    logits = F.linear(theirs[0], theirs[1], theirs[2] if with_bias else None) / temperature
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (shares * found).sum().backward()
    (shares * expected).sum().backward()
    for mine, reference in zip(ours[: 2 + with_bias], theirs, strict=False):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-10, atol=1e-12)


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
