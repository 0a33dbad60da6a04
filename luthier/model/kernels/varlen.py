"""Attention of all samples of a row in one call: FlashAttention as PyTorch brings it, on a GPU in 16 bits.

    o_i = softmax over j <= i of the same sample (s q_i k_j) v_j

Letters: H query heads, G heads of keys and values, T tokens of the row, S samples, D head size.

One call per sample would be S small kernels in each layer, and as many gradients. Dao, FlashAttention-2,
https://arxiv.org/abs/2307.08691.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from luthier.model.dtype import computed_in
from luthier.model.kernels.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE, MAX_CONSUMER_HEAD_SIZE, HEAD_SIZE_MULTIPLE = 256, 192, 8
MIN_CAPABILITY = (8, 0)
"""What the kernel computes, and on which GPUs: Ampere and later."""

_is_traced: ContextVar[bool] = ContextVar("traced", default=False)


def can_attend(query: "Tensor", value: "Tensor", dropout: float) -> bool:
    """Whether the kernel computes this: 16 bits on a GPU, without dropout."""
    if not (stands_for_a_gpu(query) or (query.is_cuda and _is_there(query))):
        return False
    return (
        not dropout
        and computed_in(query) in HALVES
        and query.shape[-1] == value.shape[-1] <= MAX_HEAD_SIZE
        and query.shape[-1] % HEAD_SIZE_MULTIPLE == 0
    )


def stands_for_a_gpu(states: "Tensor") -> bool:
    """Whether these tensors without data are those of a plan for a GPU."""
    return states.is_meta and _is_traced.get()


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """While open, tensors without data stand for those of a GPU, one that has the kernel."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)


def _is_there(query: "Tensor") -> bool:
    return _kernel() is not None and _takes(query.shape[-1], _capability(query.device.index))


def _takes(head_size: int, capability: tuple[int, int]) -> bool:
    """Consumer GPUs compute no gradients for the largest heads."""
    is_consumer = MIN_CAPABILITY < capability < (9, 0)
    return capability >= MIN_CAPABILITY and not (is_consumer and head_size > MAX_CONSUMER_HEAD_SIZE)


def varlen_attention(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    bounds: "Tensor",
    samples: Samples,
    scaling: float | None,
    sliding_window: int | None,
) -> "Tensor":
    """query (1, H, T, D); key, value (1, G, T, D) -> (1, T, H, D)."""
    kernel = flash if query.is_meta else _kernel()
    assert kernel is not None  # `can_attend`
    dtype = computed_in(query)
    # The gradient of `states[0]` would be written into zeros.
    q, k, v = (states.transpose(1, 2).squeeze(0).to(dtype) for states in (query, key, value))
    if samples.key_tokens is not None:
        tokens = samples.key_tokens.to(k.device)  # another one while a plan traces tensors without data
        k, v = (states.index_select(0, tokens) for states in (k, v))
    out: Tensor = kernel(
        q,
        k,
        v,
        bounds,
        bounds if samples.key_bounds is None else samples.key_bounds,
        samples.longest,
        samples.longest_with_prefix,
        scale=scaling,
        # A window of n tokens holds the token itself.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
    )
    return out[None]


@functools.cache
def _kernel() -> "Callable[..., Tensor] | None":
    """None where PyTorch was built without it. That for AMD GPUs is another one."""
    is_there = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return flash if is_there else None


def flash(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    bounds: "Tensor",
    key_bounds: "Tensor",
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> "Tensor":
    """query (T, H, D); key, value (K, G, D) -> (T, H, D). Of n queries and m keys of a sample, query i sees the keys
    j <= i + m - n, and with a window those with i + m - n - j <= window_size[0].

    `torch.nn.attention.varlen` calls the same operator, but changes its arguments from version to version, and an
    operator written in Python takes the CPU longer to start.
    """
    is_causal, no_dropout, for_debugging = window_size == (-1, 0), 0.0, False
    bounds_and_lengths = (bounds, key_bounds, max_q, max_k)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *bounds_and_lengths,
        no_dropout,
        is_causal,
        for_debugging,
        scale=scale,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
    )[0]
    return out


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
