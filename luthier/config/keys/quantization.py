"""The keys that load a base model with fewer bits, and what does not go together with them.

What one method alone demands (its bits, its library) stands in its file in `luthier/model/quantization/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.config.keys.fields import variant
from luthier.config.rules.engine import Rule, Rules
from luthier.core.kinds import ADAPTERS, QUANTIZERS

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


def _quantizes(run: Any) -> bool:
    return run.quantization.quantization_bit is not None


def _is_4bit_bnb(run: Any) -> bool:
    keys = run.quantization
    return keys.quantization_method == "bnb" and keys.quantization_bit == 4


def _belongs_to_quantized(run: Any) -> bool:
    """Whether an adapter on this machine was trained with `loftq_init`."""
    folders = (Path(name, run.model.adapter_folder or "") for name in run.model.adapter_name_or_path)
    return any((folder.expanduser() / LOFTQ_FILE).is_file() for folder in folders)


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


QUANTIZATION_RULES = Rules(
    (
        Rule(
            ("quantization_method", "quantization_bit"),
            "names a kind of checkpoint, and quantizes nothing while loading",
            "leave quantization_bit and quantization_method out if the checkpoint is of this kind, which is seen from"
            " its config.json; to quantize another one set quantization_method: bnb, hqq or eetq",
            lambda run: _quantizes(run) and run.quantization.quantization_method not in QUANTIZERS.names,
        ),
        Rule(
            ("adapter_name_or_path", "quantization_bit"),
            "several adapters cannot be put on a quantized model, since all but one would have to be merged into it",
            "merge them into the original model with `luthier export`, and give its folder as model_name_or_path",
            lambda run: _quantizes(run) and len(run.model.adapter_name_or_path) > 1,
        ),
        Rule(
            ("quantization_device_map", "quantization_method", "quantization_bit"),
            "spreads 4-bit weights of bitsandbytes only",
            "set quantization_method: bnb and quantization_bit: 4, or leave it out",
            lambda run: (
                _quantizes(run) and run.quantization.quantization_device_map is not None and not _is_4bit_bnb(run)
            ),
        ),
        *(
            Rule(
                (key, "quantization_method", "quantization_bit"),
                "is read by 4-bit bitsandbytes only",
                "leave it out, or set quantization_method: bnb and quantization_bit: 4",
                lambda run, key=key: _quantizes(run) and key in run.changed and not _is_4bit_bnb(run),  # type: ignore[misc]
                only_warns=True,
            )
            for key in ("quantization_type", "double_quantization")
        ),
    )
)
"""For the commands that compute with a model."""

QUANTIZED_TRAINING_RULES = Rules(
    (
        Rule(
            ("quantization_bit", "finetuning_type"),
            "quantized weights cannot learn, only an adapter beside them",
            "set finetuning_type: lora, or leave quantization_bit out",
            lambda run: (
                _quantizes(run)
                and run.finetuning_type in ADAPTERS.names
                and not ADAPTERS.get(run.finetuning_type).adds_weights
            ),
        ),
        *(
            Rule(
                (key, "quantization_bit"),
                "the embeddings of a quantized model cannot get new rows",
                "add the tokens to the original model first, or leave quantization_bit out",
                lambda run, key=key: _quantizes(run) and bool(run.given.get(key)),  # type: ignore[misc]
            )
            for key in GROWING_KEYS
        ),
        Rule(
            ("train_from_scratch", "quantization_bit"),
            "random weights that are quantized cannot learn",
            "leave one of the two out",
            lambda run: _quantizes(run) and run.model.train_from_scratch,
        ),
        Rule(
            ("quantization_device_map",),
            "spreads the model over devices for generation, not for training",
            "leave it out; to train on several devices set the environment variable FORCE_TORCHRUN=1",
            lambda run: _quantizes(run) and run.quantization.quantization_device_map is not None and run.trains,
        ),
        Rule(
            ("quantization_bit", "fsdp", "deepspeed"),
            "FSDP and ZeRO-3 share out 4-bit weights of bitsandbytes only",
            "set quantization_method: bnb and quantization_bit: 4, or leave fsdp and ZeRO-3 out",
            lambda run: _quantizes(run) and shards_weights(run) and not _is_4bit_bnb(run),
        ),
        Rule(
            ("quantization_bit", "upcast_layernorm"),
            "normalization layers compute in 16 bits on top of quantized layers, which costs stability",
            "set upcast_layernorm: true",
            lambda run: (
                _quantizes(run)
                and (run.training["bf16"] or run.training["fp16"] or run.finetuning.pure_bf16)
                and not run.model.upcast_layernorm
            ),
            only_warns=True,
        ),
        Rule(
            ("quantization_bit", "do_eval", "do_predict"),
            "what is measured are the scores of the quantized model, which may be lower than those of the original",
            "leave quantization_bit out to measure the original model",
            lambda run: _quantizes(run) and not run.trains,
            only_warns=True,
        ),
    )
)

QUANTIZED_EXPORT_RULES = Rules(
    (
        Rule(
            ("quantization_bit",),
            "is not read here: an export reads the original weights in full precision and merges adapters into them",
            "leave it out; adapters trained with loftq_init alone are merged into weights as quantized",
            lambda run: _quantizes(run) and not _belongs_to_quantized(run),
            only_warns=True,
        ),
    )
)
