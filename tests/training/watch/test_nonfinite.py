"""What is said about a step that is not finite, and how often the host waits for the accelerator to find out."""

import math

import pytest
import torch

from luthier.core.errors import RunFailed
from luthier.data.collate import SLICE_START
from luthier.training.watch.nonfinite import NonFiniteWatch
from tests.tiny import byte_tokenizer


def batch(text):
    ids = torch.tensor([byte_tokenizer().encode(text, add_special_tokens=False)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def watch(tmp_path):
    return NonFiniteWatch(byte_tokenizer(), tmp_path)


def note(watch, *losses, norm=None):
    for number, loss in enumerate(losses):
        watch.note(batch(f"row {number}"), torch.tensor(loss))
    if norm is not None:
        watch.note_gradient(torch.tensor(norm, dtype=torch.float64))


def test_a_step_is_read_once_however_many_batches_it_has(watch, monkeypatch):
    reads, read = [], torch.Tensor.tolist
    for name in ("item", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits once more"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or read(tensor))
    for _ in range(20):
        note(watch, 1.0, 2.0, 3.0, norm=1.0)
        assert watch.fault() == ""
        watch.require_finite_step(1)
    assert len(reads) == 20


@pytest.mark.parametrize(
    ("losses", "norm", "fault", "rows"),
    [
        ((1.0, math.nan, math.inf), 1.0, "the loss became nan", ["'row 1'"]),
        ((1.0, -math.inf), None, "the loss became -inf", ["'row 1'"]),
        ((1.0, 2.0), math.inf, "the norm of the gradient became inf", ["'row 0'", "'row 1'"]),
        ((1.0, 2.0), 3.0, "", ["'row 0'", "'row 1'"]),
    ],
)
def test_the_loss_comes_before_the_norm_and_its_rows_are_named(watch, losses, norm, fault, rows):
    note(watch, *losses, norm=norm)
    assert watch.fault() == fault and watch.rows() == rows
    if fault:
        with pytest.raises(RunFailed, match=f"^{fault} at step 7; no checkpoint was saved before"):
            watch.require_finite_step(7)


def test_the_rows_of_a_part_of_a_row_are_the_texts_in_it(watch):
    """Of the texts `abcd`, `efg` and `hij` this process has the fourth to the eighth character, and padding follows."""
    ids = batch("abcdefghij~~")["input_ids"][:, 3:8]
    bounds = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
    watch.note({"input_ids": ids, "cu_seq_lens_q": bounds, SLICE_START: 3}, torch.tensor(1.0))
    assert watch.rows() == ["'d'", "'efg'", "'h'"]


def test_what_is_noted_after_a_check_is_checked_too(watch):
    note(watch, 1.0)
    assert watch.fault() == ""
    note(watch, math.nan)
    assert watch.fault() == "the loss became nan"
    watch.forget()
    note(watch, 1.0)
    assert watch.fault() == ""
    watch.note_gradient(torch.tensor(math.inf))
    assert watch.fault() == "the norm of the gradient became inf"


def test_the_loss_of_a_step_is_that_of_all_its_batches(watch, said):
    for number in range(16):
        note(watch, 1.0 + number % 2 / 10, 1.0)
        watch.require_finite_step(number)
    note(watch, 2.0, 2.5)
    watch.require_finite_step(17)
    assert "step 17: the loss rose to 4.5, after 2.05" in said[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_that_is_not_finite_keeps_weights_from_being_saved(watch, value):
    """In a frozen weight it came with the model, and the run has not made it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    watch.require_finite_weights(model, 3)
    with torch.no_grad():
        model[1].weight[0, 1] = value
    with pytest.raises(RunFailed, match=r"the weight 1\.weight is not finite at step 3"):
        watch.require_finite_weights(model, 3)
    watch.require_finite_weights(model.requires_grad_(False), 3)
