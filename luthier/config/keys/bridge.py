"""Keys of Megatron-Bridge, read with `USE_MEGATRON_BRIDGE=1`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.config.keys.fields import no_effect
from luthier.config.keys.mcore import MegatronConfig
from luthier.config.keys.training import read_mapping
from luthier.core.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeConfig(MegatronConfig):
    use_distributed_optimizer: bool = True
    """Shard the optimizer state."""
    overlap_param_gather: bool = True
    """Fetch weights while computing."""
    overlap_grad_reduce: bool = True
    """Add gradients up while computing."""
    masked_softmax_fusion: bool | None = None
    """One kernel for mask and softmax."""
    use_packed_sequences: bool = False
    """Let Megatron-Bridge pack rows of sft; not possible, since rows are luthier's own."""
    mixed_precision: str = "bf16_mixed"
    """Name of the precision recipe of Megatron-Bridge: bf16_mixed, fp16_mixed, bf16_with_fp8_current_scaling_mixed, ...
    It decides alone; `bf16` is not read."""
    megatron_pretrained_checkpoint: str | None = None
    """Folder with weights in the format of Megatron to start from, instead of those of `model_name_or_path`."""
    export_hf_on_finish: bool = no_effect(
        False, "the final weights are written in the format of Hugging Face always", fulfilled=(True,)
    )
    """Write Hugging Face weights at the end."""
    extra_config: dict[str, Any] | str | None = None
    """More settings of Megatron-Bridge, as a mapping, JSON text or the name of a JSON file. Each names a setting of its
    ConfigContainer by a path with dots, e.g. `{"model.qk_layernorm": true, "train.manual_gc": true}`."""


def extra_settings(keys: BridgeConfig) -> Mapping[str, Any]:
    """What `extra_config` holds. Raises `InvalidInput`."""
    given = keys.extra_config
    if not isinstance(given, str) or not given.lstrip().startswith("{"):
        return read_mapping("extra_config", given)
    try:
        content: dict[str, Any] = json.loads(given)
    except (ValueError, RecursionError) as fault:
        raise InvalidInput(f"extra_config: not JSON ({fault}) -> correct it, or write a mapping") from fault
    return content
