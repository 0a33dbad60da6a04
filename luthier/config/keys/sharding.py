"""What a training run shards over its processes, as its keys and the settings of `accelerate launch` say."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.config.sections import is_on

GATHERS = "stage3_gather_16bit_weights_on_model_save"
"""The setting of ZeRO-3 by which whole weights are saved, in whatever format they are."""


def uses_fsdp(run: Any) -> bool:
    """Whether a training run is shared by FSDP, by its keys or by the settings of `accelerate launch`."""
    return bool(run.training["fsdp"]) or is_on(os.environ, "ACCELERATE_USE_FSDP")


def uses_deepspeed(run: Any) -> bool:
    """Whether a training run is shared by DeepSpeed, by its keys or by the settings of `accelerate launch`."""
    return run.training["deepspeed"] is not None or is_on(os.environ, "ACCELERATE_USE_DEEPSPEED")


def shards_weights(run: Any) -> bool:
    """Whether a training run shards the weights of the model over its processes (FSDP, DeepSpeed ZeRO-3)."""
    return uses_fsdp(run) or zero_stage(run) == 3


def zero_stage(run: Any) -> int | None:
    """The ZeRO stage of a training run with DeepSpeed; None if it has none or it is unknown."""
    settings = deepspeed_settings(run)
    if settings is None and is_on(os.environ, "ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return int(stage) if stage.isdecimal() else None
    return zero_settings(settings).get("stage")


def zero_settings(settings: Any) -> Mapping[str, Any]:
    """Those of ZeRO among the settings of DeepSpeed, which itself reports what is wrong; empty if there are none."""
    return settings_of(settings, "zero_optimization")


def settings_of(settings: Any, part: str) -> Mapping[str, Any]:
    """Those of a part among the settings of DeepSpeed; empty if there are none."""
    found = settings.get(part) if isinstance(settings, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def deepspeed_settings(run: Any) -> Any:
    """The DeepSpeed settings of a training run, from a file or a mapping; None if there are none or unreadable ones."""
    deepspeed = run.training["deepspeed"]
    if deepspeed is None and is_on(os.environ, "ACCELERATE_USE_DEEPSPEED"):
        deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    try:
        return json.loads(Path(deepspeed).read_bytes()) if isinstance(deepspeed, str) else deepspeed
    except (OSError, ValueError):
        return None
