"""Which attention kernel a model runs, and attention over several samples concatenated in one row.

Letters: H heads, T tokens of the row, n tokens of one sample, D head size.

Samples are concatenated without padding, so a token must attend to its own sample only. A mask for that has T x T
entries. FlashAttention takes the boundaries of the samples instead. Without its library `per_sample_attention` does the
same with the kernels of PyTorch: one call for all samples on a GPU in 16 bits (`kernels/varlen.py`), one operation for
all of them on a CPU (`kernels/sample_attention.py`), else one call per sample, n x n scores and no mask.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.machine import Machine
from luthier.core.versions import is_installed
from luthier.model.attention_kernels import FLASH, FLEX, can_be_tried
from luthier.model.modules import unwrap
from luthier.model.multimodal import blind_to_bounds, text_part
from luthier.model.trial import are_close, outputs, trying

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.model.kernels.samples import Samples

PER_SAMPLE = "luthier_per_sample"
"""The name under which transformers knows `per_sample_attention`."""
SHIFTED = "luthier_shifted"
"""The name under which transformers knows `luthier.model.features.shifted_attention`."""
_ASKED = {"disabled": "eager", "sdpa": "sdpa", "flex": FLEX, **FLASH}
_ISOLATING = (*FLASH.values(), FLEX, SHIFTED)
"""Implementations that do not attend across samples, given their boundaries."""


@dataclass(frozen=True, slots=True)
class Attention:
    implementation: str
    """As transformers calls it: `sdpa`, `eager`, `flash_attention_2`, `flash_attention_3`, `flex_attention`, or the
    kernel of a hub repository that the class of the model names as the one it needs."""
    reason: str = ""
    """Why it is not what was requested; empty if it is."""


def resolve_attention(
    asked: str, *, config: "PreTrainedConfig", model_class: "type | None", dtype: "torch.dtype", machine: Machine
) -> Attention:
    """What `flash_attn: asked` becomes: `auto`, `disabled`, `sdpa`, `fa2`, `fa3` or `flex`.

    What the machine or the model does not support is replaced by the best that they do. `model_class` is None for
    remote code, which is assumed to support every implementation.
    """
    wanted = _ASKED.get(asked, "sdpa")
    lack = _reason_against(wanted, config, model_class, dtype, machine)
    if not lack:
        return Attention(_flash_kernel(model_class) or wanted if wanted in FLASH.values() else wanted)
    best = "eager" if wanted == "sdpa" or _reason_against_sdpa(config, model_class) else "sdpa"
    return Attention(best, "" if asked == "auto" else f"{lack}: {best} attention runs instead")


def _reason_against(
    wanted: str, config: "PreTrainedConfig", model_class: "type | None", dtype: "torch.dtype", machine: Machine
) -> str:
    """Why `wanted` cannot run, or the empty string."""
    if wanted == "eager":
        return ""
    if wanted == "sdpa":
        return _reason_against_sdpa(config, model_class)
    if wanted == FLEX:
        return _reason_against_flex(config, model_class, machine)
    return _reason_against_flash(wanted, model_class, dtype, machine)


def _reason_against_sdpa(config: "PreTrainedConfig", model_class: "type | None") -> str:
    if model_class is not None and not model_class._supports_sdpa:  # type: ignore[attr-defined]
        return f"{model_class.__name__} has no SDPA attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "this model caps its attention scores, which SDPA cannot do"
    return ""


def _reason_against_flex(config: "PreTrainedConfig", model_class: "type | None", machine: Machine) -> str:
    if machine.device == "cpu":
        return "FlexAttention needs a GPU: PyTorch computes no gradients of it on a CPU"
    if model_class is not None and not model_class._supports_flex_attn:  # type: ignore[attr-defined]
        return f"{model_class.__name__} has no FlexAttention"
    if getattr(config.get_text_config(), "attention_dropout", 0):
        return "this model uses attention dropout, which FlexAttention does not have"
    return ""


def _flash_kernel(model_class: "type | None") -> str | None:
    """The FlashAttention kernel of the hub that this class needs, if the usual ones lack something (gpt-oss)."""
    kernels = getattr(model_class, "_compatible_flash_implementations", None)
    return next(iter(kernels), None) if kernels else None


def _reason_against_flash(wanted: str, model_class: "type | None", dtype: "torch.dtype", machine: Machine) -> str:
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    version = wanted[-1]
    if machine.device == "cpu":
        return f"FlashAttention-{version} needs a GPU and this machine has none"
    kernel = _flash_kernel(model_class)
    if kernel is not None:
        if not is_installed("kernels"):
            return f"the library kernels, which fetches {kernel}, is not installed"
    elif not (is_flash_attn_2_available() if version == "2" else is_flash_attn_3_available()):
        return f"the library of FlashAttention-{version} is not installed"
    if dtype == torch.float32:
        return f"FlashAttention-{version} computes in 16 bits only and this run in float32 (bf16: true changes that)"
    if model_class is not None and not model_class._supports_flash_attn:  # type: ignore[attr-defined]
        return f"{model_class.__name__} has no FlashAttention"
    return ""


def per_sample_attention(
    module: "nn.Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: "Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: "Tensor | None" = None,
    prefixes: "Tensor | None" = None,
    **kwargs: Any,
) -> "tuple[Tensor, None]":
    """Causal attention within each sample; transformers calls it from the attention layer of a model.

    query: (1, H, T, D); key, value: (1, H / groups, T, D). cu_seq_lens_q: where each sample starts, and T at the end;
    without it a row is one sample. prefixes: (samples, 2 R), the runs of tokens before those of a sample that it shares
    with another one (`luthier.data.shared_prefixes`). With a mask, that is in padded batches and while generating, it
    is plain attention. Returns (1, T, H, D) and no weights.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    from luthier.model.kernels import sample_attention, varlen
    from luthier.model.kernels.samples import samples_of

    if attention_mask is not None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None and softcap is not None:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        out = _scored_attention(query, key, value, attention_mask, scaling, dropout, softcap)
        return out.transpose(1, 2).contiguous(), None
    row = None if cu_seq_lens_q is None else samples_of(cu_seq_lens_q, prefixes)
    if cu_seq_lens_q is not None and row is not None and softcap is None:
        if varlen.can_attend(query, value, dropout):
            return varlen.varlen_attention(query, key, value, cu_seq_lens_q, row, scaling, sliding_window), None
        if sample_attention.can_attend(query, value, row, dropout, sliding_window):
            return sample_attention.sample_attention(query, key, value, row, scaling), None
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _one_by_one(query, key, value, row, scaling, dropout, sliding_window, softcap), None


def _one_by_one(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    row: "Samples | None",
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> "Tensor":
    """One call for each sample. query, key, value: (1, H, T, D) -> (1, T, H, D)."""
    import torch

    lengths = [query.shape[2]] if row is None else row.lengths
    outputs = []
    # `split` has one gradient for all samples; that of a slice is as large as the whole row, for each sample.
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    for number, (q, k, v) in enumerate(samples):
        num_tokens, num_before = lengths[number], 0 if row is None else row.num_before(number)
        if row is not None and num_before:
            before = [[all_.narrow(2, *run) for run in row.prefixes[number]] for all_ in (key, value)]
            k, v = (torch.cat([*parts, own], 2) for parts, own in zip(before, (k, v), strict=True))
        mask = None
        is_cut = sliding_window is not None and num_before + num_tokens > sliding_window
        if softcap is not None or num_before or is_cut:
            mask = _causal_mask(num_tokens, sliding_window, query.device, num_before)
        if softcap is not None:
            out = _scored_attention(q, k, v, mask, scaling, dropout, softcap)
        else:
            out = _fused_attention(q, k, v, mask, scaling, dropout)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _causal_mask(num_tokens: int, sliding_window: int | None, device: "torch.device", num_before: int = 0) -> "Tensor":
    """(n, b + n), true where token b + i may see token j: j <= b + i, and b + i - j < sliding_window."""
    import torch

    mask = torch.ones(num_tokens, num_before + num_tokens, dtype=torch.bool, device=device).tril(num_before)
    return mask if sliding_window is None else mask.triu(num_before + 1 - sliding_window)


def _fused_attention(
    query: "Tensor", key: "Tensor", value: "Tensor", mask: "Tensor | None", scaling: float | None, dropout: float
) -> "Tensor":
    """softmax(s Q K^T) V by PyTorch's kernel, causal without a mask.

    On a CPU in float32: the gradients of its 16-bit kernel take four times as long, and are less exact.
    """
    import torch

    device, dtype = query.device.type, query.dtype
    widens = device == "cpu" and dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device, enabled=False) if widens else contextlib.nullcontext():
        if widens:
            query, key, value = query.float(), key.float(), value.float()
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
    return out.to(dtype)


def _scored_attention(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    mask: "Tensor | None",
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> "Tensor":
    """softmax(c tanh(s Q K^T / c)) V with c = softcap, for models (Gemma 2) whose scores no fused kernel computes."""
    import torch

    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def per_sample_mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: "Tensor | None" = None, **kwargs: Any
) -> "Tensor | None":
    """The mask that goes with `per_sample_attention`: none for whole unpadded rows, else that of plain SDPA."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, attention_mask=attention_mask, **{**kwargs, "allow_is_causal_skip": False}
    )


Trial = Callable[["PreTrainedModel"], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Makes inputs of a model that sees: of a sample with an image, and of the same after another sample in one row."""


def isolate_samples(model: "nn.Module") -> None:
    """Make `model` attend within samples only, given their boundaries as `cu_seq_lens_q` together with `position_ids`.

    Only for models that `isolates_samples` approves. Some kernels do it already. Of a model that sees, the language
    model alone is changed: an encoder has other sequences, and attends in both directions.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    base = unwrap(model)
    text = text_part(base)
    if text.config._attn_implementation not in _ISOLATING:
        AttentionInterface.register(PER_SAMPLE, per_sample_attention)
        AttentionMaskInterface.register(PER_SAMPLE, per_sample_mask)
        text.set_attn_implementation(PER_SAMPLE)
    if text is not base:
        blind_to_bounds(base)


def isolates_samples(model: "nn.Module", trial: Trial | None = None) -> str | None:
    """None if `isolate_samples` works for this model, else the reason why its rows have to be padded.

    The class and the config are checked first. Then the model is tried: the logits of a sample must be the same after
    another sample as alone. `trial`: for a run with images, what to try.
    """
    base = unwrap(model)
    reason = reason_to_pad(base, sees=trial is not None)
    if reason is not None:
        return reason
    if not can_be_tried(base):
        return None
    if not _is_isolated(base, trial):
        return "tried on two samples, the first one changed the second"
    return None


def reason_to_pad(base: "PreTrainedModel", *, sees: bool = False) -> str | None:
    """Why rows of this model have to be padded, as far as class and config tell. `sees`: rows may have images."""
    layer_types = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    if base.config.is_encoder_decoder:
        return "it has an encoder"
    if base.config.sub_configs and not sees:
        return "it reads more than text"
    if sees and "token_type_ids" in inspect.signature(base.forward).parameters:
        return "the tokens of an image attend to each other in both directions"
    if layer_types - {"full_attention", "sliding_attention"}:
        return f"its layers are not all attention ({', '.join(sorted(layer_types))})"
    if "sliding_attention" in layer_types and not base._supports_flash_attn:
        return "its sliding windows do not reach the attention function"
    if not text_part(base)._can_set_attn_implementation():
        return "its attention cannot be replaced"
    return None


def shares_prefixes(model: "nn.Module") -> bool:
    """Whether sequences of a row may share a prompt that the row has once, given their `prefixes`.

    Asked after `isolate_samples`. Only `per_sample_attention` knows prefixes, and the model must pass them on. It is
    tried: the logits of a second answer must be the same as alone after its prompt.
    """
    base = unwrap(model)
    if base.config._attn_implementation != PER_SAMPLE:
        return False
    prompt, first, second = [1, 2, 3, 4, 5], [7, 8, 9], [10, 11, 12, 13]
    with trying(base):
        alone = outputs(base, _row(base, [prompt + second]))[5:]
        row = _row(base, [[6, 5], prompt + first, second], starts=[0, 0, 5])
        row["prefixes"] = row["cu_seq_lens_q"].new_tensor([[0, 0], [0, 0], [2, 5]])
        together = outputs(base, row)[10:]
    return are_close(base, together, alone)


def _is_isolated(base: "PreTrainedModel", trial: Trial | None) -> bool:
    first, second = [1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13]
    text = text_part(base)
    with trying(base):
        if trial is not None:
            alone, both = trial(base)
        else:
            alone, both = {"input_ids": _row(base, [second])["input_ids"]}, _row(base, [first, second])
        apart = outputs(base, alone)
        used = text.config._attn_implementation
        isolate_samples(base)
        together = outputs(base, both)[-len(apart) :]
        text.set_attn_implementation(used)
    return are_close(base, together, apart)


def _row(base: "PreTrainedModel", samples: Sequence[list[int]], starts: Sequence[int] = ()) -> dict[str, Any]:
    """What `forward` takes for samples concatenated in one row. `starts`: the position of the first token of each."""
    import torch

    lengths = [len(sample) for sample in samples]
    begins = starts or [0] * len(samples)
    ids = torch.tensor([token for sample in samples for token in sample]) % base.config.get_text_config().vocab_size
    bounds = torch.tensor([0, *lengths], device=base.device).cumsum(0).to(torch.int32)
    ranges = [torch.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
    longest = max(begin + length for begin, length in zip(begins, lengths, strict=True))
    return {
        "input_ids": ids[None].to(base.device),
        "position_ids": torch.cat(ranges)[None].to(base.device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
