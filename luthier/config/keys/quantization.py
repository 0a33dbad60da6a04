"""The keys that quantize a base model while it is loaded.

Rules about them stand in `luthier.config.rules.quantization`; those of one method in `luthier/model/quantization/`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.config.keys.fields import variant
from luthier.config.sections import is_on

CHECKPOINT_METHODS = ("gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8")
"""Names of the reference that describe prequantized checkpoints; they cannot quantize a model while loading it."""
GROWING_KEYS = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")
"""Keys that give the embeddings new rows."""


LOFTQ_FILE = "loftq.json"
"""File beside an adapter trained with `loftq_init`: how its base is quantized, by keys of this group."""


GATHERS = "stage3_gather_16bit_weights_on_model_save"
"""The setting of ZeRO-3 by which whole weights are saved, in whatever format they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    quantization_bit: int | None = None
    """Quantize the linear layers of the base model to this many bits while loading it."""
    quantization_method: str = variant("bnb", also=CHECKPOINT_METHODS)
    """Quantization method: bitsandbytes (4 or 8 bits), HQQ (1 to 6, or 8) or EETQ (8)."""
    quantization_type: Literal["fp4", "nf4"] = "nf4"
    """Number format of 4-bit bitsandbytes."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit bitsandbytes."""
    quantization_device_map: Literal["auto"] | None = None
    """Spread a 4-bit bitsandbytes model over all devices, for generation only."""


def uses_fsdp(run: Any) -> bool:
    """Whether a training run is shared by FSDP, by its keys or by the settings of `accelerate launch`."""
    return bool(run.training["fsdp"]) or is_on(os.environ, "ACCELERATE_USE_FSDP")


def shards_weights(run: Any) -> bool:
    """Whether a training run shards the weights of the model over its processes (FSDP, DeepSpeed ZeRO-3)."""
    return uses_fsdp(run) or zero_stage(run) == 3


def zero_stage(run: Any) -> int | None:
    """The ZeRO stage of a training run with DeepSpeed; None if it has none or it is unknown."""
    settings = deepspeed_settings(run)
    if settings is None and is_on(os.environ, "ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return int(stage) if stage.isdecimal() else None
    try:
        return (settings or {})["zero_optimization"]["stage"]
    except (KeyError, TypeError):  # deepspeed itself reports what is wrong
        return None


def deepspeed_settings(run: Any) -> Any:
    """The DeepSpeed settings of a training run, from a file or a mapping; None if there are none or unreadable ones."""
    deepspeed = run.training["deepspeed"]
    if deepspeed is None and is_on(os.environ, "ACCELERATE_USE_DEEPSPEED"):
        deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    try:
        return json.loads(Path(deepspeed).read_bytes()) if isinstance(deepspeed, str) else deepspeed
    except (OSError, ValueError):  # deepspeed itself reports what is wrong with the file
        return None
