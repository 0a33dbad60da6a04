"""Attention of samples that share tokens: the same as with the whole matrix of scores."""

import pytest
import torch

from luthier.model.kernels import sample_attention as kernel
from luthier.model.kernels.samples import samples_of

HEADS, KEY_HEADS, SIZE = 4, 2, 8
LENGTHS = (7, 1, 30, 12, 5)
LAYOUTS = {
    "own tokens": None,
    "one prefix": ((0, 0), (0, 0), (2, 5), (0, 0), (8, 20)),
    "prefixes in two runs": ((0, 0, 0, 0), (0, 4, 0, 0), (0, 0, 0, 0), (8, 10, 0, 0), (8, 10, 38, 3)),
}


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, sum(LENGTHS), SIZE, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def row_of(layout):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return samples_of(bounds, None if LAYOUTS[layout] is None else torch.tensor(LAYOUTS[layout]))


def whole_matrix(query, key, value, row, scaling):
    """softmax(s Q K^T + mask) V, with the mask of all tokens."""
    mask = torch.full((sum(LENGTHS), sum(LENGTHS)), -torch.inf, dtype=query.dtype)
    for (start, length), prefixes in zip(row.own, row.prefixes, strict=True):
        for n in range(length):
            mask[start + n, start : start + n + 1] = 0
            for first, number in prefixes:
                mask[start + n, first : first + number] = 0
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, 1) for states in (key, value))
    return ((query @ key.transpose(2, 3) * scaling + mask).softmax(-1) @ value).transpose(1, 2)


def outcome(attend, states, row, weights):
    out = attend(*states, row, 0.3)
    gradients = torch.autograd.grad((out * weights).sum(), states)
    return [out.detach(), *gradients]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("takes_fewer", [True, False])
def test_outputs_and_gradients_are_those_of_the_whole_matrix(monkeypatch, layout, takes_fewer):
    monkeypatch.setattr(kernel, "TAKES_FEWER_KEY_HEADS", takes_fewer)
    row, states = row_of(layout), drawn()
    weights = torch.randn(1, sum(LENGTHS), HEADS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = outcome(kernel.sample_attention, states, row, weights)
    for one, expected in zip(found, outcome(whole_matrix, states, row, weights), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_numbers_are_computed_in_float32(layout):
    row, states = row_of(layout), drawn(torch.bfloat16)
    weights = torch.randn(1, sum(LENGTHS), HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    found = outcome(kernel.sample_attention, states, row, weights.bfloat16())
    exact = outcome(whole_matrix, [s.detach().double().requires_grad_() for s in states], row, weights.bfloat16())
    assert {one.dtype for one in found} == {torch.bfloat16}
    for one, expected in zip(found, exact, strict=True):
        assert (one - expected).norm() < 0.006 * expected.norm(), "rounded once, as a result of 8 bits is"


def test_scores_of_any_size():
    """The normalizer of the first run is far above that of the second, and the other way round."""
    row = row_of("prefixes in two runs")
    for scale in (1e-4, 30.0):
        states = [(s.detach() * scale).requires_grad_() for s in drawn()]
        weights = torch.ones(1, sum(LENGTHS), HEADS, SIZE, dtype=torch.float64)
        found = outcome(kernel.sample_attention, states, row, weights)
        for one, expected in zip(found, outcome(whole_matrix, states, row, weights), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12 * max(scale, 1) ** 2)


def test_numbers_of_a_head_need_not_stand_side_by_side():
    row, states = row_of("one prefix"), drawn()
    weights = torch.randn(1, sum(LENGTHS), HEADS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apart = [s.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for s in states]
    assert all(s.stride(-1) != 1 for s in apart)
    found = outcome(kernel.sample_attention, apart, row, weights)
    for one, expected in zip(found, outcome(kernel.sample_attention, states, row, weights), strict=True):
        torch.testing.assert_close(one, expected)


def test_what_it_leaves_to_others():
    query, _, value = drawn()
    row = row_of("one prefix")
    assert kernel.can_attend(query, value, row, 0.0, None) and kernel.can_attend(query, value, row, 0.0, 50)
    assert not kernel.can_attend(query, value, row, 0.1, None), "dropout"
    assert not kernel.can_attend(query, value, row, 0.0, 34), "a window shorter than a sample with its prefix"
    assert not kernel.can_attend(query, value[..., :4], row, 0.0, None), "values of another size"


def test_keys_are_not_kept_for_each_query_head():
    """What the backward pass needs: query, keys, values and output as they are, and a number for each query."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda states: kept.append(states.shape[1]) or states, lambda s: s):
        kernel.sample_attention(*drawn(torch.bfloat16), row_of("one prefix"), None)
    assert sorted(kept) == [KEY_HEADS, KEY_HEADS, HEADS, HEADS, HEADS]
