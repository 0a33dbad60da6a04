"""Attention of all samples of a row in one call: the same as one call per sample."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from luthier.model.attention import per_sample_attention
from luthier.model.kernels import varlen

LENGTHS = (7, 1, 30, 12, 5)
PREFIXES = ((0, 0, 0, 0), (0, 0, 0, 0), (2, 5, 0, 0), (0, 0, 0, 0), (2, 5, 8, 20))
"""Of each sample the runs of tokens that it shares: where each begins, and how many tokens it has."""
HEADS, KEY_HEADS, SIZE = 4, 2, 16
LAYOUTS = {"own prompts": None, "shared prompts": PREFIXES}
WINDOWS = {"whole": None, "window": 6}


def like_the_kernel(query, key, value, bounds, key_bounds, max_q, max_k, *, scale, window_size):
    """As PyTorch documents `varlen_attn`: the last query sees the last key, and `window_size` tokens before it."""
    assert bounds.diff().max() == max_q and key_bounds.diff().max() == max_k
    outputs = []
    for (start, end), (first, last) in zip(pairwise(bounds), pairwise(key_bounds), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last]))
        before = k.shape[1] - q.shape[1]
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(before)
        if window_size[0] >= 0:
            mask = mask.triu(before - window_size[0])
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def attended(prefixes, window, device="cpu", dtype=torch.float64):
    """What `per_sample_attention` returns, and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, sum(LENGTHS), SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]
    query, key, value, weights = (one.to(device, dtype) for one in states)
    inputs = [one.requires_grad_() for one in (query, key, value)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    shared = None if prefixes is None else torch.tensor(prefixes, device=device)
    out, _ = per_sample_attention(
        torch.nn.Module(), *inputs, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=bounds, prefixes=shared
    )
    (out * weights.transpose(1, 2)).sum().backward()
    return [out.detach(), *(one.grad for one in inputs)]


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("prefixes", LAYOUTS.values(), ids=LAYOUTS)
def test_what_the_kernel_is_given(monkeypatch, prefixes, window):
    """In float64 on a CPU, with a stand-in that computes as the documentation of the kernel says."""
    expected = attended(prefixes, window)
    monkeypatch.setattr(varlen, "can_attend", lambda *args: True)
    monkeypatch.setattr(varlen, "_kernel", lambda: like_the_kernel)
    for found, value in zip(attended(prefixes, window), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("window", [(-1, 0), (5, 0)])
def test_the_operator_of_pytorch_takes_these_arguments(window):
    """On tensors without data, which only have shapes; with fewer heads of keys, and with gradients."""
    with torch.device("meta"):
        query = torch.empty(10, HEADS, SIZE, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(12, KEY_HEADS, SIZE, dtype=torch.bfloat16, requires_grad=True)
        bounds = torch.empty(3, dtype=torch.int32)
    out = varlen.flash(query, key, key, bounds, bounds, 10, 12, scale=0.3, window_size=window)
    assert out.shape == query.shape
    out.sum().backward()
    assert query.grad.shape == query.shape and key.grad.shape == key.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("prefixes", LAYOUTS.values(), ids=LAYOUTS)
def test_the_kernel_itself(prefixes, window):
    """In bfloat16, against float64 of the CPU."""
    query = torch.zeros(1, 1, 1, SIZE, device="cuda", dtype=torch.bfloat16)
    assert varlen.can_attend(query, query, 0.0)
    for found, value in zip(
        attended(prefixes, window, "cuda", torch.bfloat16), attended(prefixes, window), strict=True
    ):
        assert (found.cpu().double() - value).norm() <= 0.01 * value.norm()


def test_it_needs_a_gpu_and_16_bits():
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.zeros(1, 1, 1, SIZE, dtype=dtype)
        assert not varlen.can_attend(query, query, 0.0)
        with varlen.traced():
            assert varlen.can_attend(query.to("meta"), query.to("meta"), 0.0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("size", "is_taken"), [(8, True), (256, True), (12, False), (264, False)])
def test_heads_that_it_computes(size, is_taken):
    query = torch.zeros(1, 1, 1, size, dtype=torch.bfloat16, device="meta")
    with varlen.traced():
        assert varlen.can_attend(query, query, 0.0) == is_taken
        assert not varlen.can_attend(query, query, 0.1)
        assert not varlen.can_attend(query, query[..., :4], 0.0)


def test_consumer_gpus_compute_no_gradients_of_the_largest_heads():
    hopper, ada, ampere, turing = (9, 0), (8, 9), (8, 0), (7, 5)
    assert varlen._takes(256, hopper) and varlen._takes(256, ampere) and varlen._takes(128, ada)
    assert not varlen._takes(256, ada) and not varlen._takes(64, turing)
