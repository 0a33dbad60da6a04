"""Attention over a row whose tokens are spread over the processes of a group (DeepSpeed Ulysses, arXiv 2309.14509).

Letters: P processes, N tokens of the row, n = N / P tokens of a process, H heads, G key and value heads, D head size.

Everything but attention works token by token. Attention gets all tokens of some heads in place of some tokens of all
heads: an all-to-all turns (H, n, D) into (H / P, N, D), each process computes H / P heads as it would in a run of its
own, and another all-to-all turns the result back. A process never holds the hidden states of more than n tokens.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from luthier.core.errors import ModelError
from luthier.model.attention import PER_SAMPLE, per_sample_attention, per_sample_mask
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

SEQUENCE_PARALLEL = "luthier_sequence_parallel"
"""The name under which transformers knows `sequence_parallel_attention`."""
_OF_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the length of the whole sequence."""


class Group(Protocol):
    """Processes that share rows: torch's `ProcessGroup`, or so many that are planned only."""

    def size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    num_processes: int

    def size(self) -> int:
        return self.num_processes


def spread_tokens(model: "nn.Module", group: Group, padding_reason: str | None) -> None:
    """Make `model` attend over rows whose tokens are spread over `group`. Other rows are computed as before.

    Called after `isolate_samples`. Raises `ModelError` for a model that cannot do that. `padding_reason`: why rows of
    this model have to be padded. A `PlannedGroup` suits a model on the `meta` device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    base = unwrap(model)
    num_processes = group.size()
    reason, remedy = (padding_reason, "") if padding_reason else _reason_against(base, num_processes)
    if reason:
        raise ModelError(
            f"sp_size: rows of this model cannot be spread over {num_processes} processes: {reason}"
            f" -> {remedy or 'leave sp_size out'}"
        )
    AttentionInterface.register(SEQUENCE_PARALLEL, partial(sequence_parallel_attention, group=group))
    AttentionMaskInterface.register(SEQUENCE_PARALLEL, per_sample_mask)
    base.set_attn_implementation(SEQUENCE_PARALLEL)


def _reason_against(base: "PreTrainedModel", num_processes: int) -> tuple[str, str]:
    """Reason and remedy, empty if the model can do it."""
    config = base.config.get_text_config()
    if base.config._attn_implementation != PER_SAMPLE:
        return f"its attention is {base.config._attn_implementation}", ""
    num_heads = config.num_attention_heads
    if num_heads % num_processes:
        divisors = [str(count) for count in range(2, num_heads + 1) if num_heads % count == 0]
        return f"its {num_heads} attention heads cannot be shared equally", f"set sp_size to {' or '.join(divisors)}"
    kind = next((kind for kind in _rope_types(config) if kind in _OF_LENGTH), None)
    return ("", "") if kind is None else (f"its rotary embedding ({kind}) depends on the length of the whole row", "")


def _rope_types(config: "PreTrainedConfig") -> list[str]:
    """The kinds of rotary embedding of a model; some have one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [str(one["rope_type"]) for one in each if "rope_type" in one]


def sequence_parallel_attention(
    module: "nn.Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: "Tensor | None",
    *,
    group: Group,
    cu_seq_lens_q: "Tensor | None" = None,
    **kwargs: Any,
) -> "tuple[Tensor, None]":
    """As `per_sample_attention`, for rows that end beyond the tokens of this process.

    query: (1, H, n, D); key, value: (1, G, n, D). cu_seq_lens_q: where each sample of the whole row starts, and N.
    Returns (1, n, H, D).
    """
    from luthier.model.kernels.samples import samples_of

    is_whole = cu_seq_lens_q is None or sum(samples_of(cu_seq_lens_q, None).lengths) == query.shape[2]
    if is_whole:
        return per_sample_attention(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
    key, value = (_enough_heads(states, group.size()) for states in (key, value))
    query, key, value = (_all_tokens(states, group) for states in (query, key, value))
    out, _ = per_sample_attention(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
    return _own_tokens(out, group), None


def _enough_heads(states: "Tensor", num_processes: int) -> "Tensor":
    """(1, G, n, D) with heads repeated, so that each process gets as many, and the ones that its queries belong to."""
    num_heads = states.shape[1]
    return states.repeat_interleave(math.lcm(num_heads, num_processes) // num_heads, dim=1)


def _exchanged(blocks: "Tensor", group: Any) -> "Tensor":
    """As `luthier.model.kernels.exchange`; of tensors without data, one of the same size."""
    if blocks.is_meta:
        return blocks.contiguous().clone()
    from luthier.model.kernels.exchange import exchange

    return exchange(blocks, group)


def _all_tokens(states: "Tensor", group: Group) -> "Tensor":
    """(1, H, n, D) -> (1, H / P, N, D)."""
    received = _exchanged(states[0].unflatten(0, (group.size(), -1)), group)
    return received.transpose(0, 1).flatten(1, 2)[None]


def _own_tokens(out: "Tensor", group: Group) -> "Tensor":
    """(1, N, H / P, D) -> (1, n, H, D)."""
    received = _exchanged(out[0].unflatten(0, (group.size(), -1)), group)
    return received.transpose(0, 1).flatten(1, 2)[None]
