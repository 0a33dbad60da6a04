"""Which attention code the model runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.machine import Machine

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_FLASH = {"fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_ASKED = {"disabled": "eager", "sdpa": "sdpa", **_FLASH}


@dataclass(frozen=True, slots=True)
class Attention:
    implementation: str
    """As transformers calls it: `sdpa`, `eager`, `flash_attention_2`, `flash_attention_3`."""
    reason: str = ""
    """Why it is not what was asked for; empty if it is."""


def resolve_attention(
    asked: str, *, config: "PreTrainedConfig", model_class: "type | None", dtype: "torch.dtype", machine: Machine
) -> Attention:
    """What `flash_attn: asked` becomes: `auto`, `disabled`, `sdpa`, `fa2` or `fa3`.

    What the machine or the model lacks is replaced by the best they have. `model_class` is None for remote code, which
    is believed to know every implementation. Raises `ModelError` for a model whose only one the machine lacks.
    """
    lacks = {name: _lacks(name, config, model_class, dtype, machine) for name in ("sdpa", "eager", *_FLASH.values())}
    wanted = _ASKED.get(asked, "sdpa")
    if not lacks[wanted]:
        return Attention(wanted)
    best = next((name for name in ("sdpa", "eager") if not lacks[name]), None)
    if best is None:
        raise ModelError(f"flash_attn: {asked}: {lacks[wanted]}, and this model has no other attention to run")
    return Attention(best, "" if asked == "auto" else f"{lacks[wanted]}: {best} attention runs instead")


def _lacks(
    implementation: str,
    config: "PreTrainedConfig",
    model_class: "type | None",
    dtype: "torch.dtype",
    machine: Machine,
) -> str:
    """What keeps `implementation` from running, or the empty text."""
    if implementation == "eager":
        return ""
    if implementation == "sdpa":
        return _sdpa_lacks(config, model_class)
    return _flash_lacks(implementation, model_class, dtype, machine)


def _sdpa_lacks(config: "PreTrainedConfig", model_class: "type | None") -> str:
    if model_class is not None and not model_class._supports_sdpa:  # type: ignore[attr-defined]
        return f"{model_class.__name__} has no SDPA attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "this model caps its attention scores, which SDPA cannot do"
    return ""


def _flash_lacks(implementation: str, model_class: "type | None", dtype: "torch.dtype", machine: Machine) -> str:
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    version = implementation[-1]
    if machine.device == "cpu":
        return f"FlashAttention-{version} needs a GPU and this machine has none"
    if not (is_flash_attn_2_available() if version == "2" else is_flash_attn_3_available()):
        return f"the library of FlashAttention-{version} is not installed"
    if dtype == torch.float32:
        return f"FlashAttention-{version} computes in 16 bits only and this run in float32 (bf16: true changes that)"
    if model_class is not None and not model_class._supports_flash_attn:  # type: ignore[attr-defined]
        return f"{model_class.__name__} has no FlashAttention"
    return ""
