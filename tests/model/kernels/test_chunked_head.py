"""Losses of a linear head in chunks equal the textbook ones, value and gradients, however the logits are cut."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from luthier.model.kernels import chunked_head, products, varlen
from luthier.model.kernels.chunked_head import linear_cross_entropy, linear_logps, most_likely


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
    for limit in ("CHUNK_ELEMENTS", "SMALL_CHUNK_ELEMENTS"):
        monkeypatch.setattr(chunked_head, limit, chunk_elements)
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
    for limit in ("CHUNK_ELEMENTS", "SMALL_CHUNK_ELEMENTS"):
        monkeypatch.setattr(chunked_head, limit, chunk_elements)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1024, 1000])
def test_the_most_likely_id_is_the_first_of_the_largest(dtype, size):
    logits = torch.randint(0, 50, (64, size), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert most_likely(logits).tolist() == expected


def test_gradients_of_16_bits_are_scaled_as_exactly_as_those_of_32(monkeypatch):
    """1 / 510 in bfloat16 is off by 0.4 %, which would be the error of all gradients."""
    monkeypatch.setattr(chunked_head, "SCALED_ROWS", 7)
    grad = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    (found,) = chunked_head._scaled([grad], torch.tensor(1 / 510))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (grad.float() / 510).bfloat16())


def test_chunks_are_small_where_that_costs_no_time():
    hidden, frozen = torch.empty(5000, 2), torch.empty(2**14, 2)
    learned = frozen.clone().requires_grad_()

    def num_rows(weight):
        part, *_ = chunked_head._chunks(hidden, weight)
        return part.stop

    assert (num_rows(frozen), num_rows(learned)) == (1024, 4096)
    assert num_rows(frozen.to("meta")) == 1024  # of a plan for a CPU
    with varlen.traced():
        assert num_rows(frozen.to("meta")) == 4096


@pytest.mark.parametrize("has_half_kernel", [True, False])
@pytest.mark.parametrize("form", [linear_cross_entropy, linear_logps])
def test_weight_and_bias_of_another_format_count_as_in_that_of_the_hidden_states(monkeypatch, form, has_half_kernel):
    monkeypatch.setattr(products, "has_half_kernel", lambda dtype: has_half_kernel)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 4), torch.randn(7, 4), torch.randn(7)
    targets = torch.randint(0, 7, (9,))
    ours = [hidden.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    theirs = [one.detach().bfloat16().requires_grad_() for one in ours]
    results = [form(*sources, targets) for sources in (ours, theirs)]
    found, expected = (one[0] if isinstance(one, tuple) else one for one in results)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    found.sum().backward()
    expected.sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.bfloat16(), reference.grad)


@pytest.mark.parametrize("form", [linear_cross_entropy, linear_logps])
def test_where_16_bits_are_slow_the_numbers_are_the_same(monkeypatch, form):
    """Those of 16 bits, also under autocast."""
    torch.manual_seed(0)
    sources = [torch.randn(shape).bfloat16() for shape in ((90, 8), (11, 8), (11,))]
    targets = torch.randint(0, 11, (90,))
    results = []
    for is_fast in (True, False):
        monkeypatch.setattr(products, "has_half_kernel", lambda dtype, is_fast=is_fast: is_fast)
        own = [one.clone().requires_grad_() for one in sources]
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_fast):
            found = form(*own, targets)
        found = found[0] if isinstance(found, tuple) else found
        results.append([found, *torch.autograd.grad(found.sum(), own)])
    for one, other in zip(*results, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)


def test_no_gradient_is_computed_where_none_is_asked_for():
    """In an evaluation of a model whose head is trained."""
    hidden, weight, bias = torch.randn(70, 4), torch.randn(7, 4, requires_grad=True), torch.randn(7, requires_grad=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, _ = linear_cross_entropy(hidden, weight, bias, torch.zeros(70, dtype=torch.long))
    assert not loss.requires_grad and counter.get_total_flops() == 2 * 70 * 4 * 7


@pytest.mark.parametrize("form", [linear_cross_entropy, linear_logps])
def test_no_target_at_all(form):
    sources = [torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)]
    found = form(*sources, None, torch.zeros(0, dtype=torch.long))
    total = found[0] if isinstance(found, tuple) else found.sum()
    total.backward()
    assert total == 0 and all(torch.equal(one.grad, torch.zeros_like(one)) for one in sources)
