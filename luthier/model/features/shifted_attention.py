"""Shifted sparse attention of LongLoRA, for training on long texts: `shift_attn`, https://arxiv.org/abs/2309.12307.

Letters: H heads, T tokens of a row, n tokens of one text, G = n / 4 tokens of a group (rounded up), D head size.

Each token sees those before it in its group only, which costs a quarter of full attention. For the first half of the
heads groups begin at 0, G, 2 G, ...; for the other half they are shifted by G / 2, so that what one group knows reaches
the next one in the next layer. The paper's code rolls the row for that, and its last shifted group holds the end and
the beginning of the text; here these two halves are groups of their own, so no token sees what comes after it.

Outside training it is full attention: that is what the model is trained for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rules, all_of, in_training, is_other_than, is_set, warning
from luthier.core.errors import ModelError
from luthier.model.attention import SHIFTED
from luthier.model.features import Feature, Purpose

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedAttentionConfig:
    shift_attn: bool = False
    """Shifted sparse attention: attend within groups of a long text while training (https://arxiv.org/abs/2309.12307).
    """


RULES = Rules(
    in_training(
        warning(
            ("flash_attn", "shift_attn"),
            "is not read, since shift_attn has kernels of its own",
            "leave it out",
            all_of(is_set("features.shifted_attention", "shift_attn"), is_other_than("model", "flash_attn", "auto")),
        ),
    )
)


NUM_GROUPS = 4


def shifted_attention(
    module: "nn.Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: "Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: "Tensor | None" = None,
    **kwargs: Any,
) -> "tuple[Tensor, None]":
    """Transformers calls it from the attention layer of a model.

    query: (B, H, T, D); key, value: (B, H / groups, T, D). Texts of a row: `cu_seq_lens_q` where each begins, and T at
    the end; or the (B, T) `attention_mask` of padded rows, one text per row. With a (B, 1, T, S) mask, that is while
    generating, it is plain attention. Returns (B, T, H, D) and no weights; padding gets zeros.
    """
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if query.shape[2] != key.shape[2] or (attention_mask is not None and attention_mask.ndim == 4):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    groups, half = query.shape[1] // key.shape[1], query.shape[1] // 2
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = torch.zeros_like(query)
    for row, begin, end in _texts(query.shape[0], query.shape[2], attention_mask, cu_seq_lens_q):
        for heads, starts in zip((slice(half), slice(half, None)), _starts(end - begin, module.training), strict=True):
            for first, last in pairwise([*starts, end - begin]):
                part = (slice(row, row + 1), heads, slice(begin + first, begin + last))
                out[part] = torch.nn.functional.scaled_dot_product_attention(
                    query[part], key[part], value[part], dropout_p=dropout, is_causal=True, scale=scaling
                )
    return out.transpose(1, 2).contiguous(), None


def _texts(
    num_rows: int, num_tokens: int, padding: "Tensor | None", bounds: "Tensor | None"
) -> Iterator[tuple[int, int, int]]:
    """(row, begin, end) of each text."""
    from luthier.model.kernels.samples import numbers_of

    if padding is not None:
        for row, is_text in enumerate(numbers_of(padding)):
            if any(is_text):
                begin = is_text.index(True)
                yield row, begin, begin + sum(is_text)
    else:
        for begin, end in pairwise([0, num_tokens] if bounds is None else numbers_of(bounds)):
            yield from ((row, begin, end) for row in range(num_rows))


def _starts(num_tokens: int, training: bool) -> tuple[Sequence[int], Sequence[int]]:
    """Where groups begin, for each half of the heads."""
    if not training:
        return [0], [0]
    size = -(-num_tokens // NUM_GROUPS)
    return range(0, num_tokens, size), sorted({0, *range(size // 2, num_tokens, size)})


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: "Tensor | None" = None, **kwargs: Any
) -> "Tensor | None":
    """The (B, T) padding mask as it is for whole rows, else that of plain SDPA."""
    from transformers.masking_utils import sdpa_mask

    if q_length == kv_length:
        return attention_mask
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


def shift_attention(model: "PreTrainedModel") -> None:
    """Let `model` train with shifted groups. Raises `ModelError` if its attention is of another kind."""
    from transformers import AttentionInterface, AttentionMaskInterface

    lack = _reason_against(model)
    if lack:
        raise ModelError(f"shift_attn: {type(model).__name__} {lack} -> leave shift_attn out")
    AttentionInterface.register(SHIFTED, shifted_attention)
    AttentionMaskInterface.register(SHIFTED, _mask)
    model.set_attn_implementation(SHIFTED)


def _reason_against(model: "PreTrainedModel") -> str:
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ())
    if config.is_encoder_decoder or config.sub_configs:
        return "is not a plain decoder of text"
    if not model._can_set_attn_implementation():
        return "does not let its attention be replaced"
    if layer_types - {"full_attention"} or (not layer_types and getattr(config, "sliding_window", None)):
        return "has layers with another attention than full"
    if not model._supports_sdpa or getattr(config, "attn_logit_softcapping", None):
        return "has attention scores that are more than scaled products"
    return ""


def on_model(keys: ShiftedAttentionConfig, model: "PreTrainedModel", purpose: Purpose) -> None:
    if keys.shift_attn and purpose.training is not None:
        shift_attention(model)


FEATURE = Feature(name="shifted_attention", config=ShiftedAttentionConfig, check=RULES, on_model=on_model)
