"""Rules about quantizing a model while it is loaded."""

from pathlib import Path
from typing import Any

from luthier.config.keys.quantization import GROWING_KEYS, LOFTQ_FILE
from luthier.config.keys.sharding import shards_weights
from luthier.config.rules.engine import Rules, When, all_of, is_changed, is_given, is_set, is_turned_on, not_
from luthier.config.rules.model import trains_adapter
from luthier.core.kinds import QUANTIZERS

is_quantized = is_given("quantization", "quantization_bit")
_with_bits = When(is_quantized)
_has_device_map = is_given("quantization", "quantization_device_map")


def _is_4bit_bnb(run: Any) -> bool:
    keys = run.quantization
    return keys.quantization_method == "bnb" and keys.quantization_bit == 4


def _has_loftq_adapter(run: Any) -> bool:
    """Whether an adapter on this machine was trained with `loftq_init`."""
    folders = (Path(name, run.model.adapter_folder or "") for name in run.model.adapter_name_or_path)
    return any((folder.expanduser() / LOFTQ_FILE).is_file() for folder in folders)


QUANTIZATION_RULES = Rules(
    (
        _with_bits.refuses(
            ("quantization_method", "quantization_bit"),
            "names a kind of checkpoint, and quantizes nothing while loading",
            "leave quantization_bit and quantization_method out if the checkpoint is of this kind, which is seen from"
            " its config.json; to quantize another one set quantization_method: bnb, hqq or eetq",
            lambda run: run.quantization.quantization_method not in QUANTIZERS.names,
        ),
        _with_bits.refuses(
            ("adapter_name_or_path", "quantization_bit"),
            "a quantized model takes one adapter only, since all but the last would have to be merged into it",
            "merge them into the original model with `luthier export`, and give its folder as model_name_or_path",
            lambda run: len(run.model.adapter_name_or_path) > 1,
        ),
        _with_bits.refuses(
            ("quantization_device_map", "quantization_method", "quantization_bit"),
            "spreads 4-bit weights of bitsandbytes only",
            "set quantization_method: bnb and quantization_bit: 4, or leave it out",
            all_of(_has_device_map, not_(_is_4bit_bnb)),
        ),
        *(
            _with_bits.warns(
                (key, "quantization_method", "quantization_bit"),
                "is read by 4-bit bitsandbytes only",
                "leave it out, or set quantization_method: bnb and quantization_bit: 4",
                all_of(is_changed(key), not_(_is_4bit_bnb)),
            )
            for key in ("quantization_type", "double_quantization")
        ),
    )
)
"""For the commands that compute with a model."""

QUANTIZED_TRAINING_RULES = Rules(
    (
        _with_bits.refuses(
            ("quantization_bit", "finetuning_type"),
            "quantized weights cannot be trained, only an adapter beside them",
            "set finetuning_type: lora, or leave quantization_bit out",
            not_(trains_adapter),
        ),
        *(
            _with_bits.refuses(
                (key, "quantization_bit"),
                "the embeddings of a quantized model cannot get new rows",
                "add the tokens to the original model first, or leave quantization_bit out",
                is_turned_on(key),
            )
            for key in GROWING_KEYS
        ),
        _with_bits.refuses(
            ("train_from_scratch", "quantization_bit"),
            "random weights that are quantized cannot be trained",
            "leave one of the two out",
            is_set("model", "train_from_scratch"),
        ),
        _with_bits.refuses(
            ("quantization_device_map",),
            "spreads the model over devices for generation, not for training",
            "leave it out; to train on several devices set the environment variable FORCE_TORCHRUN=1",
            all_of(_has_device_map, lambda run: run.trains),
        ),
        _with_bits.refuses(
            ("quantization_bit", "fsdp", "deepspeed"),
            "of quantized weights, FSDP and ZeRO-3 shard those of 4-bit bitsandbytes only",
            "set quantization_method: bnb and quantization_bit: 4, or leave fsdp and ZeRO-3 out",
            all_of(shards_weights, not_(_is_4bit_bnb)),
        ),
        _with_bits.warns(
            ("quantization_bit", "upcast_layernorm"),
            "normalization layers compute in 16 bits on top of quantized layers, which costs stability",
            "set upcast_layernorm: true",
            lambda run: (
                (run.training["bf16"] or run.training["fp16"] or run.finetuning.pure_bf16)
                and not run.model.upcast_layernorm
            ),
        ),
        _with_bits.warns(
            ("quantization_bit", "do_eval", "do_predict"),
            "the scores are those of the quantized model, which may be lower than those of the original",
            "leave quantization_bit out to measure the original model",
            lambda run: not run.trains,
        ),
    )
)

QUANTIZED_EXPORT_RULES = Rules(
    (
        _with_bits.warns(
            ("quantization_bit",),
            "is not read here: an export reads the original weights in full precision and merges adapters into them",
            "leave it out; only adapters trained with loftq_init are merged into quantized weights",
            not_(_has_loftq_adapter),
        ),
    )
)
