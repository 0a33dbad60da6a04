"""Attention of all samples of a row on a CPU: no mask, and no copies of the keys that several samples share.

A sample attends to the tokens of its prefixes, all of which come before its own, and causally to its own. Each run of
keys p is attended to for itself, and gives an output and the logarithm of its normalizer:

    o_p = softmax(s Q K_p^T) V_p        l_p = log sum_j exp(s q k_pj)

The whole is their mean, weighted by normalizers (as the blocks of https://arxiv.org/abs/2205.14135):

    l = log sum_p exp(l_p)              o = sum_p exp(l_p - l) o_p

The gradients of a run follow from o and l of the whole, since its probabilities are exp(s q k_pj - l).

H query heads, G heads of keys and values, T tokens of the row, n tokens of a sample, D head size. Queries are
(1, H, T, D), keys and values (1, G, T, D). 16-bit numbers are computed in float32: the gradients of PyTorch's 16-bit
kernel take four times as long on a CPU, and are less exact.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.model.kernels.samples import Run, Samples
from luthier.model.kernels.varlen import HALVES, stands_for_a_gpu

TAKES_FEWER_KEY_HEADS = torch.__version__ >= "2.11"
"""Whether PyTorch's kernel is known to take G heads of keys for H of queries. For others the keys are repeated."""


def can_attend(query: Tensor, value: Tensor, row: Samples, dropout: float, sliding_window: int | None) -> bool:
    """On a CPU, without dropout, and where no window is shorter than a sample."""
    is_cut = sliding_window is not None and row.longest_with_prefix > sliding_window
    is_here = query.device.type == "cpu" or (query.is_meta and not stands_for_a_gpu(query))
    return is_here and not dropout and not is_cut and query.shape[-1] == value.shape[-1]


def sample_attention(query: Tensor, key: Tensor, value: Tensor, row: Samples, scaling: float | None) -> Tensor:
    """query (1, H, T, D); key, value (1, G, T, D) -> (1, T, H, D)."""
    out: Tensor = SampleAttention.apply(query, key, value, row, scaling)
    return out.transpose(1, 2)


class SampleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Samples, scaling: float | None) -> Tensor:
        """(1, H, T, D), in the format of `query` and laid out as (1, T, H, D)."""
        q, k, v = (in_full(states) for states in (query, key, value))
        out = _laid_out_by_tokens(query, query.dtype)
        normalizers = q.new_empty(q.shape[:-1])
        for own, prefixes in zip(row.own, row.prefixes, strict=True):
            whole, normalizer = _forward(_part(q, own), _part(k, own), _part(v, own), scaling, is_causal=True)
            for run in prefixes:
                more, its_own = _forward(_part(q, own), _part(k, run), _part(v, run), scaling, is_causal=False)
                together = torch.logaddexp(normalizer, its_own)
                whole = whole * _weight(normalizer, together) + more * _weight(its_own, together)
                normalizer = together
            _part(out, own).copy_(whole)
            normalizers.narrow(2, *own).copy_(normalizer)
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.row, ctx.scaling = row, scaling
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalizers = ctx.saved_tensors
        q, k, v, o, do = (in_full(states) for states in (query, key, value, out, d_out))
        dq, dk, dv = (_laid_out_by_tokens(states, q.dtype).zero_() for states in (query, key, value))
        for own, prefixes in zip(ctx.row.own, ctx.row.prefixes, strict=True):
            mine = Queries(*(_part(states, own) for states in (q, o, normalizers, do)))
            for run in (own, *prefixes):
                grads = _backward(mine, _part(k, run), _part(v, run), ctx.scaling, is_causal=run is own)
                for whole, grad, tokens in zip((dq, dk, dv), grads, (own, run, run), strict=True):
                    _part(whole, tokens).add_(grad)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def in_full(states: Tensor) -> Tensor:
    """In float32 if they have 16 bits, and the numbers of a head side by side: the kernel takes that for granted."""
    wide = states.float() if states.dtype in HALVES else states
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _laid_out_by_tokens(states: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (1, H, T, D) that is (1, T, H, D) in memory, as the projections before and after it read it."""
    return torch.empty_like(states.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _part(states: Tensor, run: Run) -> Tensor:
    """These tokens of (1, H, T, D) or (1, H, T)."""
    return states.narrow(2, *run)


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """exp(l_p - l), (1, H, n, 1)."""
    return (part - whole).exp_().unsqueeze(-1)


def _forward(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """o_p (1, H, n, D) and l_p (1, H, n)."""
    k, v = (_for_each_query_head(states, q) for states in (k, v))
    no_dropout = 0.0
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, no_dropout, is_causal, scale=scaling
    )
    return found


class Queries(NamedTuple):
    """Those of one sample, what they got from all its keys, and the gradient of that."""

    q: Tensor
    out: Tensor
    normalizers: Tensor
    d_out: Tensor


def _backward(
    mine: Queries, k: Tensor, v: Tensor, scaling: float | None, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by one run of keys."""
    num_heads, no_dropout = k.shape[1], 0.0
    k, v = (_for_each_query_head(states, mine.q) for states in (k, v))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        mine.d_out, mine.q, k, v, mine.out, mine.normalizers, no_dropout, is_causal, scale=scaling
    )
    if dk.shape[1] != num_heads:
        dk, dv = (grad.unflatten(1, (num_heads, -1)).sum(2) for grad in (dk, dv))
    return dq, dk, dv


def _for_each_query_head(states: Tensor, q: Tensor) -> Tensor:
    """(1, G, n, D), or (1, H, n, D) for a kernel that needs as many."""
    return states if TAKES_FEWER_KEY_HEADS else states.repeat_interleave(q.shape[1] // states.shape[1], 1)
