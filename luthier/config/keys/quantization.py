"""The keys that load a base model with fewer bits, and what does not go together with them.

What one method alone demands (its bits, its library) stands in its file in `luthier/model/quantization/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.config.keys.fields import variant

CHECKPOINT_METHODS = ("gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8")
"""Names of the reference that describe checkpoints. Nothing can be quantized by them while it is loaded."""
GROWING_KEYS = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")
"""Keys that give the embeddings new rows."""


LOFTQ_FILE = "loftq.json"
"""Beside an adapter that starts from the error of quantization: how its base is quantized, by keys of this group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    quantization_bit: int | None = None
    """Bits to quantize the linear layers of the base model to while loading; the layers keep to those bits."""
    quantization_method: str = variant("bnb", also=CHECKPOINT_METHODS)
    """Who quantizes: bitsandbytes (4 or 8 bits), HQQ (1 to 6, or 8) or EETQ (8)."""
    quantization_type: Literal["fp4", "nf4"] = "nf4"
    """Number type of the 4 bits of bitsandbytes."""
    double_quantization: bool = True
    """Quantize the scales of the 4 bits of bitsandbytes as well."""
    quantization_device_map: Literal["auto"] | None = None
    """Spread a 4-bit bitsandbytes model over all devices, for generation only."""


def shards_weights(run: Any) -> bool:
    """Whether a training run shares the weights of the model out between its processes (FSDP, DeepSpeed ZeRO-3)."""
    return bool(run.training["fsdp"]) or zero_stage(run) == 3


def zero_stage(run: Any) -> int | None:
    """The ZeRO stage of the DeepSpeed config of a training run, a file or a mapping; None if it cannot be told."""
    deepspeed = run.training["deepspeed"]
    try:
        config = json.loads(Path(deepspeed).read_bytes()) if isinstance(deepspeed, str) else deepspeed
        return config["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with the file, deepspeed itself says best
        return None
